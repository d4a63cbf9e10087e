"""An answer is held back until there is something to send with it, or it is a refusal."""

from __future__ import annotations

import asyncio

from starlette.responses import Response
from starlette.types import Message

from sglang_ext.admission_hook import HeldAnswer

START: Message = {"type": "http.response.start", "status": 200, "headers": []}
BODY: Message = {"type": "http.response.body", "body": b"data", "more_body": True}
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
