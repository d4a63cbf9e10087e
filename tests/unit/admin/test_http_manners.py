"""What every answer has, whichever layer gives it; and bodies that never come."""

from __future__ import annotations

import http.client
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp

from engine_plugins.admin import body_limit
from tests.support.admin_server import TOKEN, AdminServer
from tests.support.engine_server import free_port
from tests.support.problems import problem
from tests.support.waiting import until

MakeServer = Callable[..., AdminServer]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        ("trainer-7/step-12", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("two words", False),
        ("", False),
        (None, False),
    ],
)
async def test_every_answer_has_a_request_id(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture, sent: str | None, echoed: bool
) -> None:
    """The caller's own where it can be a header and a word of a log; refusals have one too."""
    caplog.set_level(logging.INFO)
    headers = {} if sent is None else {"x-request-id": sent}
    server = make_server()
    ids = set()
    async with server.running():
        for method, path, token in (
            ("GET", "/state", TOKEN),
            ("POST", "/resume", TOKEN),
            ("POST", "/nowhere", TOKEN),
            ("POST", "/pause", "nobody's"),
            ("HEAD", "/state", TOKEN),
        ):
            more = headers | {"authorization": f"Bearer {token}"}
            answer = await server.http.request(method, path, headers=more)
            (given,) = answer.headers.get_list("x-request-id")
            assert (given == sent) == echoed
            assert given
            ids.add(given)
    assert len(ids) == (1 if echoed else 5)
    lines = [each.getMessage() for each in caplog.records if "(request " in each.getMessage()]
    assert len(lines) == 1, "what only reads, and strangers, leave no line"
    assert lines[0].startswith("POST '/admin/v1/resume': 200 after")


@pytest.mark.anyio
async def test_a_bug_is_found_in_the_log_by_the_request_id(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server()

    async def broken(**caches: bool) -> None:
        raise ZeroDivisionError("one by none")

    server.engine.flush = broken  # type: ignore[assignment, method-assign]
    async with server.running():
        await server.http.post("/flush", headers={"x-request-id": "step-12"})
    assert "an admin route failed (request step-12)" in caplog.text


@pytest.mark.anyio
async def test_head_is_get_without_the_body(make_server: MakeServer) -> None:
    """With its scope, its headers and its status; where there is no GET it is 405 with Allow."""
    server = make_server()
    async with server.running():
        for path in ("/state", "/weights", "/openapi.json"):
            head, get = await server.http.head(path), await server.get(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"] == get.headers["content-type"]
        wrong = await server.http.head("/pause")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        stranger = await server.http.head("/state", headers={"authorization": "Bearer x"})
        assert (stranger.status_code, stranger.content) == (401, b"")


@contextmanager
def over_sockets(app: ASGIApp) -> Iterator[int]:
    """The port of a real HTTP server in a thread."""
    port = free_port()
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started, otherwise=lambda: "the server did not start")
        yield port
    finally:
        server.should_exit = True
        thread.join()


HALF = (
    b"POST /admin/v1/pause HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
    + TOKEN.encode()
    + b"\r\nContent-Length: 100\r\n\r\n{"
)


def test_bodies_that_stall_are_given_up_and_hold_nobody_up(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 of 80 had stayed open: each is told, and its connection closed; nothing is paused."""
    monkeypatch.setattr(body_limit, "SILENCE_S", 5.0)
    server = make_server()
    with over_sockets(server.app) as port, ExitStack() as links:
        opened = [
            links.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            for _ in range(80)
        ]
        for link in opened:
            link.sendall(HALF)
        slow = links.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        slow.sendall(HALF[:-1])
        state = httpx.get(
            f"http://127.0.0.1:{port}/admin/v1/state",
            headers={"authorization": f"Bearer {TOKEN}"},
            timeout=60,
        )
        assert state.status_code == 200
        assert not select.select(opened, [], [], 0)[0], "none of them has been given up"
        for byte in b"{" + b" " * 98 + b"}":
            slow.sendall(bytes([byte]))
            time.sleep(0.02)
        assert _answer(slow) == (200, "paused")
        for link in opened:
            assert _answer(link) == (408, "body_stalled")
            assert link.recv(1) == b"", "the connection is closed"
    server.engine.close()


def _answer(link: socket.socket) -> tuple[int, str]:
    answer = http.client.HTTPResponse(link)
    answer.begin()
    told = httpx.Response(answer.status, content=answer.read()).json()
    return answer.status, told.get("code") or told["state"]


@pytest.mark.anyio
async def test_the_limit_is_that_of_the_route_that_will_run(make_server: MakeServer) -> None:
    """By the end of its path, a route of no manifest had the manifests' limit."""
    server = make_server()
    body = b" " * (2 << 20)
    async with server.running():
        for path in ("/zz/weights/sources", "/weights/sources/", "/weights/sources/zz"):
            problem(await server.http.post(path, content=body), 404, "unknown_route")
        problem(
            await server.http.post("/pause?/weights/sources", content=body), 413, "body_too_large"
        )
        problem(await server.http.post("/weights/sources", content=body), 400, "malformed_request")
