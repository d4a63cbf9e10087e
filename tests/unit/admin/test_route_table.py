"""Which route a request will run, and which paths no request may have."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import Scope

from engine_plugins.admin.route_table import RouteTable, oddity_of_path


async def answer(request: Request) -> Response:
    return Response()


TABLE = RouteTable(
    [
        Mount("/files", Starlette()),
        Route("/gate", answer, methods=["PATCH"]),
        Route("/gate", answer, methods=["GET"]),
        Route("/plans/{plan_id}", answer, methods=["POST"]),
        Route("/plans/first", answer, methods=["POST", "DELETE"]),
    ]
)


def request(method: str, path: str, raw_path: bytes | None = None) -> Scope:
    return {"type": "http", "method": method, "path": path, "raw_path": raw_path, "root_path": ""}


@pytest.mark.parametrize(
    ("method", "path", "found"),
    [
        ("GET", "/gate", ("GET", "/gate")),
        ("HEAD", "/gate", ("HEAD", "/gate")),
        ("PATCH", "/gate", ("PATCH", "/gate")),
        ("POST", "/plans/x", ("POST", "/plans/{plan_id}")),
        ("POST", "/plans/first", ("POST", "/plans/{plan_id}")),
        ("DELETE", "/plans/first", ("DELETE", "/plans/first")),
        ("DELETE", "/plans/x", None),
        ("GET", "/nowhere", None),
        ("GET", "/files/x", None),
    ],
)
def test_the_first_route_that_takes_a_request_is_found(
    method: str, path: str, found: tuple[str, str] | None
) -> None:
    """As the router runs it, under the path that it was declared with."""
    assert TABLE.find(request(method, path)) == found


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/gate", ["GET", "HEAD", "PATCH"]),
        ("/plans/first", ["DELETE", "POST"]),
        ("/plans/x", ["POST"]),
        ("/nowhere", []),
        ("/files/x", []),
    ],
)
def test_the_methods_of_all_routes_of_a_path_are_named(path: str, methods: list[str]) -> None:
    """Sorted, so that an answer does not change from one process to the next."""
    assert TABLE.methods_at(request("TRACE", path)) == methods


CONTROL, SLASH, DOUBLED = "a control character", "an encoded slash", "a doubled slash"


@pytest.mark.parametrize(
    ("path", "raw_path", "oddity"),
    [
        ("/pause", b"/pause", None),
        ("/pause", b"/%70ause", None),
        ("/pause", None, None),
        ("/\udcff", b"/%ff", None),
        ("/pause\n", None, CONTROL),
        ("/pa use", None, CONTROL),
        ("/pause", b"/pause%0A", CONTROL),
        ("/pause", b"/pause%1f", CONTROL),
        ("/pause", b"/pause%7F", CONTROL),
        ("/pause\x7f", b"/pause", CONTROL),
        ("/a\\b", None, SLASH),
        ("/a/b", b"/a%2fb", SLASH),
        ("/a/b", b"/a%5Cb", SLASH),
        ("//pause", b"/pause", DOUBLED),
        ("/pause", b"//pause", DOUBLED),
    ],
)
def test_what_routers_read_in_several_ways_is_named(
    path: str, raw_path: bytes | None, oddity: str | None
) -> None:
    """In the path as it was sent or in the path as the server decoded it."""
    assert oddity_of_path(request("GET", path, raw_path)) == oddity


def test_a_server_that_does_not_say_what_was_sent_is_served() -> None:
    """`raw_path` is optional in ASGI."""
    assert oddity_of_path({"path": "/pause"}) is None
    assert oddity_of_path({"path": "//pause"}) == DOUBLED


@pytest.mark.parametrize("root", ["/tiny/", "/\udcff/"])
def test_a_doubled_slash_after_the_root_path_is_the_operators(root: str) -> None:
    """In either form of the path; what follows the root path is judged as ever."""
    for path, oddity in ((f"{root}/pause", None), (f"{root}//pause", DOUBLED)):
        sent = path.encode("utf-8", "surrogateescape")
        for scope in (request("GET", path, b"/pause"), request("GET", "/pause", sent)):
            assert oddity_of_path({**scope, "app_root_path": root}) == oddity
            assert oddity_of_path(scope) == DOUBLED
