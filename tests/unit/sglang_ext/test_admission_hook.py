"""An answer is held back until it is known that its request is taken."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from starlette.responses import Response
from starlette.types import Message

from sglang_ext.admission_hook import HeldAnswer

START: Message = {"type": "http.response.start", "status": 200, "headers": []}
BODY: Message = {"type": "http.response.body", "body": b"data", "more_body": True}
REFUSAL = Response(status_code=413)


class Client:
    """What an HTTP client gets to see."""

    def __init__(self, *, single: bool = True) -> None:
        self.seen: list[Message] = []
        self.answer = HeldAnswer(self._receive)
        self.answer.request = SimpleNamespace(is_single=single)

    async def _receive(self, message: Message) -> None:
        self.seen.append(message)


def run(steps: Any) -> None:
    """Run a coroutine to its end."""
    asyncio.run(steps)


def test_a_stream_opens_once_its_request_is_taken() -> None:
    async def steps() -> None:
        client = Client()
        await client.answer.send(START)
        assert client.seen == []
        await client.answer.taken()
        assert client.seen == [START]
        await client.answer.send(BODY)
        assert client.seen == [START, BODY]

    run(steps())


def test_what_is_taken_first_is_not_held_at_all() -> None:
    async def steps() -> None:
        client = Client()
        await client.answer.taken()
        await client.answer.send(START)
        assert client.seen == [START]

    run(steps())


def test_of_several_prompts_a_later_one_may_still_be_refused() -> None:
    async def steps() -> None:
        client = Client(single=False)
        await client.answer.send(START)
        await client.answer.taken()
        client.answer.refuse(REFUSAL)
        await client.answer.send(BODY)
        assert client.seen == []
        assert client.answer.refusal is REFUSAL

    run(steps())


def test_routes_that_generate_nothing_are_passed_on() -> None:
    async def steps() -> None:
        client = Client()
        client.answer.request = None
        await client.answer.send(START)
        await client.answer.send(BODY)
        assert client.seen == [START, BODY]

    run(steps())


def test_an_answer_that_has_begun_goes_on() -> None:
    async def steps() -> None:
        client = Client()
        await client.answer.send(START)
        await client.answer.send(BODY)
        client.answer.refuse(REFUSAL)
        await client.answer.send(BODY)
        assert client.seen == [START, BODY, BODY]
        assert client.answer.refusal is None

    run(steps())
