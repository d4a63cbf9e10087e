"""Tokens and scopes, checked before a request's body is looked at."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Scope

from engine_plugins.admin.routes import SCOPES
from engine_plugins.settings import Settings
from tests.support.admin_server import TOKEN, AdminServer

pytestmark = pytest.mark.anyio

MakeServer = Callable[..., AdminServer]
ROUTES = sorted(SCOPES)


async def raw(
    server: AdminServer, method: str, path: str, *headers: tuple[bytes, bytes]
) -> tuple[int, dict[str, Any], int]:
    """Call the application without a client: status, problem, and how often the body was read."""
    sent: list[Message] = []
    reads = 0

    async def receive() -> Message:
        nonlocal reads
        reads += 1
        return {"type": "http.request", "body": b"\xff" * (1 << 20), "more_body": reads < 100}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": f"/admin/v1{path}",
        "raw_path": f"/admin/v1{path}".encode(),
        "query_string": b"",
        "root_path": "",
        "headers": list(headers),
        "server": ("engine", 80),
        "client": ("peer", 1),
    }
    await server.app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], httpx.Response(200, content=body).json(), reads


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_without_a_token_nothing_of_a_body_is_read(
    make_server: MakeServer, method: str, path: str
) -> None:
    """100 MB of garbage cost nothing: 401 comes before the first byte is asked for."""
    server = make_server()
    for headers in (
        [(b"content-length", b"104857600")],
        [(b"authorization", b"Bearer wrong"), (b"content-type", b"application/json")],
        [(b"authorization", b"Basic " + TOKEN.encode())],
        [(b"authorization", TOKEN.encode())],
        [(b"authorization", b"Bearer " + TOKEN.encode() + b"x")],
        [(b"authorization", b"Bearer \xff\xfe")],
    ):
        status, problem, reads = await raw(server, method, path, *headers)
        assert (status, problem["code"], reads) == (401, "unauthorized", 0)
        assert "Bearer" in problem["remedy"]
    server.engine.close()


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_server_without_a_token_is_closed(
    make_server: MakeServer, method: str, path: str
) -> None:
    """503 on every route, naming both settings; no token opens it, not even an empty one."""
    for settings in (Settings(), Settings(admin_token="")):
        server = make_server(settings=settings)
        for header in (b"Bearer ", b"Bearer None", b"Bearer x"):
            status, problem, reads = await raw(server, method, path, (b"authorization", header))
            assert (status, problem["code"], reads) == (503, "not_configured", 0)
            assert (
                problem["detail"]
                == "this server has no admin token, so its admin routes are closed"
            )
            assert "ENGINE_PLUGINS_ADMIN_TOKEN " in problem["remedy"]
            assert "ENGINE_PLUGINS_ADMIN_TOKEN_FILE" in problem["remedy"]
        server.engine.close()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(
        "# who may do what\n\nread r-token\ncontrol c-token\nweights w-token\n"
        "read both\nweights both\n"
    )
    return path


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    ("token", "scopes"),
    [
        ("r-token", {"read"}),
        ("c-token", {"control"}),
        ("w-token", {"weights"}),
        ("both", {"read", "weights"}),
        (TOKEN, {"read", "control", "weights"}),
    ],
)
async def test_a_token_opens_the_routes_of_its_scopes(
    make_server: MakeServer,
    token_file: Path,
    method: str,
    path: str,
    token: str,
    scopes: set[str],
) -> None:
    """Others answer 403 before the body is read, and say what is missing."""
    server = make_server(settings=Settings(admin_token=TOKEN, admin_token_file=token_file))
    header = (b"authorization", b"bearer " + token.encode())
    if SCOPES[method, path] not in scopes:
        status, problem, reads = await raw(server, method, path, header)
        assert (status, problem["code"], reads) == (403, "forbidden", 0)
        assert SCOPES[method, path] in problem["detail"]
        assert ", ".join(sorted(scopes)) in problem["detail"]
    else:
        server.http.headers["authorization"] = f"Bearer {token}"
        answer = await server.http.request(method, path, content=b"{}")
        assert answer.status_code not in (401, 403, 503)
    server.engine.close()


async def test_every_route_of_the_application_has_a_scope(make_server: MakeServer) -> None:
    """A new route without one would be open to every token."""
    server = make_server()
    async with server.running():
        paths = (await server.get("/openapi.json")).json()["paths"]
    offered = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert offered == set(SCOPES)


async def test_a_token_file_is_read_again_when_it_changes(
    make_server: MakeServer, token_file: Path
) -> None:
    """Rotation without a restart: replaced, rewritten in place, broken, mended, taken away."""
    server = make_server(settings=Settings(admin_token_file=token_file))

    async def status(token: str) -> int:
        server.http.headers["authorization"] = f"Bearer {token}"
        return (await server.get("/state")).status_code

    async with server.running():
        assert await status("r-token") == 200
        _replace(token_file, b"read second\n")
        assert (await status("r-token"), await status("second")) == (401, 200)
        _rewrite_unseen(token_file, b"read third-token\n")
        assert (await status("second"), await status("third-token")) == (401, 200)
        for broken in (b"read too many words\n", b"admin x\n", b"read\n", b"\xff\xfe\x00"):
            _replace(token_file, broken)
            answer = await server.get("/state")
            assert (answer.status_code, answer.json()["code"]) == (503, "not_configured")
            assert str(token_file) not in answer.text
            assert "line" not in answer.text
        _replace(token_file, b"read third-token\n")
        assert await status("third-token") == 200
        _replace(token_file, b"# nobody\n")
        assert await status("third-token") == 503
        _replace(token_file, None)
        assert await status("third-token") == 503


def _replace(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
        return
    new = path.with_name("new")
    new.write_bytes(content)
    new.replace(path)


def _rewrite_unseen(path: Path, content: bytes) -> None:
    """In place and within one tick of the file system's clock: same file, same time."""
    stamp = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


async def test_a_token_may_have_any_characters(make_server: MakeServer) -> None:
    """Headers are bytes; a token typed in UTF-8 is compared as it was typed."""
    server = make_server(settings=Settings(admin_token="geheim-ü"))
    status, _, _ = await raw(
        server, "POST", "/resume", (b"authorization", "Bearer geheim-ü".encode())
    )
    assert status == 413
    server.engine.close()


NO_TOKEN = {
    "code": "unauthorized",
    "detail": "no token, or not one of this server's",
    "remedy": "send `Authorization: Bearer <token>`",
    "state": None,
}
FORBIDDEN = {
    "code": "forbidden",
    "detail": "this route needs a token of scope control; yours has read, weights",
    "remedy": "use another token",
    "state": "serving",
}
WRONG_METHOD = {
    "code": "method_not_allowed",
    "detail": "this route takes GET, HEAD, PATCH, not DELETE",
    "remedy": "GET /admin/v1/openapi.json lists the routes",
    "state": "serving",
}
NO_ROUTE = {
    "code": "unknown_route",
    "detail": "there is no admin route of this path",
    "remedy": "GET /admin/v1/openapi.json lists the routes",
    "state": "serving",
}
ODD_PATH = {
    **NO_ROUTE,
    "detail": "the path of this request has a doubled slash; no admin route has one",
}


@pytest.mark.parametrize(
    ("method", "path", "token", "status", "said", "headers"),
    [
        ("POST", "/pause", "nobody's", 401, NO_TOKEN, {"www-authenticate": "Bearer"}),
        ("POST", "/pause", "both", 403, FORBIDDEN, {}),
        ("DELETE", "/prefill-gate", "both", 405, WRONG_METHOD, {"allow": "GET, HEAD, PATCH"}),
        ("POST", "/nowhere", "both", 404, NO_ROUTE, {}),
        ("POST", "//pause", "both", 404, ODD_PATH, {}),
    ],
)
async def test_a_refusal_says_why_and_what_to_do(
    make_server: MakeServer,
    token_file: Path,
    method: str,
    path: str,
    token: str,
    status: int,
    said: dict[str, str | None],
    headers: dict[str, str],
) -> None:
    """Only those with a token are told the engine's state."""
    server = make_server(settings=Settings(admin_token_file=token_file))
    url = f"{server.http.base_url}".rstrip("/") + path
    async with server.running():
        answer = await server.http.request(
            method, url, headers={"authorization": f"Bearer {token}"}
        )
    assert answer.status_code == status
    assert said.items() <= answer.json().items()
    assert headers.items() <= dict(answer.headers).items()


async def test_a_websocket_is_closed_at_once(make_server: MakeServer) -> None:
    """With or without a token: 1008 is what a policy refuses with."""
    server = make_server()
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("nothing is awaited of it")

    async def send(message: Message) -> None:
        sent.append(message)

    header = (b"authorization", f"Bearer {TOKEN}".encode())
    scope = {"type": "websocket", "path": "/admin/v1/state", "headers": [header]}
    await server.app(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": ""}]
    server.engine.close()


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (f"Bearer {TOKEN}", 200),
        (f"BEARER   {TOKEN}  ", 200),
        (f"Bearer {TOKEN} {TOKEN}", 401),
        (f"Token {TOKEN}", 401),
        ("Bearer", 401),
    ],
)
async def test_how_a_token_is_sent(make_server: MakeServer, value: str, status: int) -> None:
    """The scheme in any case, then the token; other headers have no part in it."""
    server = make_server()
    headers = {"x-before": "Bearer other", "authorization": value, "x-after": "Bearer other"}
    async with server.running():
        answer = await server.http.get("/state", headers=headers)
    assert answer.status_code == status
