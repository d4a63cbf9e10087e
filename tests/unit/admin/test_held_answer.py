"""An answer is held back until there is something to send with it, or it is a refusal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from engine_plugins.admin.held_answer import (
    HeldAnswer,
    RefuseBeforeStream,
    held_answer,
    releasing,
)
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import Fence, moved
from tests.support.gate_board import publish_gate

START: Message = {"type": "http.response.start", "status": 200, "headers": []}
BODY: Message = {"type": "http.response.body", "body": b"data", "more_body": True}
END: Message = {"type": "http.response.body", "body": b"", "more_body": False}
REFUSAL = Response(status_code=413)


class Client:
    """What an HTTP client gets to see."""

    def __init__(self) -> None:
        self.seen: list[Message] = []
        self.answer = HeldAnswer(self._receive)

    async def _receive(self, message: Message) -> None:
        self.seen.append(message)


def test_an_answer_begins_with_its_first_bytes() -> None:
    async def steps() -> None:
        client = Client()
        await client.answer.send(START)
        assert client.seen == []
        await client.answer.send(BODY)
        assert client.seen == [START, BODY]

    asyncio.run(steps())


def test_what_was_kept_back_gives_way_to_a_refusal() -> None:
    async def steps() -> None:
        client = Client()
        await client.answer.send(START)
        client.answer.refuse(REFUSAL)
        await client.answer.send(BODY)
        assert client.seen == []
        assert client.answer.refusal is REFUSAL

    asyncio.run(steps())


def test_an_answer_that_has_begun_goes_on() -> None:
    async def steps() -> None:
        client = Client()
        await client.answer.send(START)
        await client.answer.send(BODY)
        client.answer.refuse(REFUSAL)
        await client.answer.send(BODY)
        assert client.seen == [START, BODY, BODY]
        assert client.answer.refusal is None

    asyncio.run(steps())


def test_a_body_is_kept_until_all_who_hold_it_let_go() -> None:
    """What was kept comes in its order, and an answer that ends is not kept."""

    async def steps() -> None:
        client = Client()
        let_go, let_go_too = client.answer.hold(), client.answer.hold()
        for message in (START, BODY):
            await client.answer.send(message)
        let_go()
        let_go()
        await client.answer.send(BODY)
        assert client.seen == []
        assert not client.answer.begun
        let_go_too()
        await client.answer.send(BODY)
        assert client.seen == [START, BODY, BODY, BODY]
        ended = Client()
        ended.answer.hold()
        for message in (START, BODY, END):
            await ended.answer.send(message)
        assert ended.seen == [START, BODY, END]

    asyncio.run(steps())


@pytest.mark.parametrize("all_of_them", [True, False], ids=["to-the-end", "left"])
def test_a_hold_ends_with_the_output_that_was_waited_for_or_with_the_last(
    all_of_them: bool,
) -> None:
    async def steps() -> None:
        client, seen = Client(), []
        outputs = releasing(_numbers(), client.answer.hold(), when=lambda number: number == 2)
        await client.answer.send(START)
        async for number in outputs:
            await client.answer.send(BODY)
            seen.append((number, client.answer.begun))
            if not all_of_them:
                break
        await outputs.aclose()
        if not all_of_them:
            await client.answer.send(BODY)
        assert client.answer.begun
        assert seen == [(1, False), (2, True), (3, True)][: 3 if all_of_them else 1]

    asyncio.run(steps())


async def _numbers() -> AsyncGenerator[int, None]:
    for number in (1, 2, 3):
        yield number


async def _stream(request: Request) -> Response:
    """Says something at once, and is refused before or after its first token."""
    held = held_answer()
    assert held is not None, "this answer is not held"
    let_go, late = held.hold(), "late" in request.query_params

    async def events() -> AsyncIterator[str]:
        yield "created "
        if late:
            let_go()
            yield "token "
        held.refuse(PlainTextResponse("too large", 413))
        raise RuntimeError("refused")

    return StreamingResponse(events())


async def _is_held(_: Request) -> Response:
    return JSONResponse(held_answer() is not None)


async def _fail(_: Request) -> Response:
    raise RuntimeError("nobody refused")


def _get(shared: SharedState, path: str) -> httpx.Response:
    async def get() -> httpx.Response:
        app = Starlette(
            routes=[Route("/stream", _stream), Route("/held", _is_held), Route("/fail", _fail)],
            middleware=[Middleware(RefuseBeforeStream, shared=shared)],
        )
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return await client.get(path)

    return asyncio.run(get())


@pytest.mark.parametrize("mode", [None, "off", "observe", "enforce"])
def test_answers_are_held_where_the_gate_refuses(
    shared: SharedState, runtime_dir: Path, mode: str | None
) -> None:
    """`None` is a scheduler that has said nothing."""
    if mode is not None:
        publish_gate(runtime_dir, mode)
    assert _get(shared, "/held").json() is (mode == "enforce")


def test_answers_are_held_while_the_engine_is_fenced(shared: SharedState) -> None:
    fence = Fence(code="x", detail="half-new weights", remedy="update", attempted_version=2)
    shared.change(lambda state: moved(state, "fenced", fence=fence))
    assert _get(shared, "/held").json() is True


def test_a_stream_is_refused_by_its_status_until_it_has_begun(
    shared: SharedState, runtime_dir: Path
) -> None:
    """Whatever the route makes of the refusal; and an error that is none stays what it is."""
    publish_gate(runtime_dir, "enforce")
    refused = _get(shared, "/stream")
    assert (refused.status_code, refused.text) == (413, "too large")
    late = _get(shared, "/stream?late=1")
    assert (late.status_code, late.text) == (200, "created token ")
    assert _get(shared, "/fail").status_code == 500


def test_a_refusal_does_not_wait_for_what_a_route_does_after_its_answer(
    shared: SharedState, runtime_dir: Path
) -> None:
    """SGLang's streams look for a client that has left, 2 s later."""
    publish_gate(runtime_dir, "enforce")
    seen: list[Message] = []
    seen_before_the_end: list[int] = []

    async def send(message: Message) -> None:
        seen.append(message)

    async def receive() -> Message:
        raise AssertionError("nobody reads a request")

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        held = held_answer()
        assert held is not None
        held.refuse(REFUSAL)
        for message in (START, BODY, END):
            await send(message)
        seen_before_the_end.extend(message.get("status", 0) for message in seen)

    app = RefuseBeforeStream(route, shared=shared)
    asyncio.run(app({"type": "http"}, receive, send))
    assert seen_before_the_end == [413, 0]
    assert len(seen) == 2
