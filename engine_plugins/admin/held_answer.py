"""Answers whose beginning is kept back, so that a late refusal is still a status.

A streaming route sends its 200 before it asks for the first token, and a scheduler may refuse
later still. Answers are held while the engine is fenced or its prefill gate refuses.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine_plugins.admin.shared_state import SharedState
from engine_plugins.prefill_gate.entry import GateBoard

__all__ = ["HeldAnswer", "RefuseBeforeStream", "held_answer", "releasing"]


class HeldAnswer:
    """One HTTP answer whose beginning is kept back until there is something to send with it.

    The first token comes no later for it.
    """

    def __init__(self, send: Send) -> None:
        self.refusal: Response | None = None
        self.begun = False
        """Whether anything has been sent: no refusal comes in time then."""
        self._send = send
        self._kept: list[Message] = []
        self._awaited: set[object] = set()

    async def send(self, message: Message) -> None:
        """Pass a message of the route's on, or keep it back."""
        if self.refusal is not None:
            return
        self._kept.append(message)
        if not self.begun and self._keeps(message):
            return
        self.begun = True
        while self._kept:
            await self._send(self._kept.pop(0))

    def hold(self) -> Callable[[], None]:
        """Keep the body of a stream back too, until what this returns has been called.

        For routes that send something before the first token, and for answers of several requests.
        What ends the answer is sent in any case.
        """
        awaited = object()
        self._awaited.add(awaited)
        return partial(self._awaited.discard, awaited)

    def refuse(self, answer: Response) -> None:
        """Answer this instead, unless the other answer has begun."""
        if not self.begun:
            self.refusal = answer

    def _keeps(self, message: Message) -> bool:
        if message["type"] == "http.response.start":
            return True
        return bool(self._awaited) and bool(message.get("more_body"))


_held: ContextVar[HeldAnswer | None] = ContextVar("engine_plugins_held_answer", default=None)


def held_answer() -> HeldAnswer | None:
    """The answer to the HTTP request that is being handled, where it may have to be a refusal."""
    return _held.get()


async def releasing(
    outputs: AsyncGenerator[Any, None],
    release: Callable[[], None],
    *,
    when: Callable[[Any], bool] = lambda _: True,
) -> AsyncGenerator[Any, None]:
    """The same outputs; `release` is called before the first for which `when` holds, or at the end.

    Args:
        outputs: of a request.
        release: what `HeldAnswer.hold` has returned.
        when: asked about each output.
    """
    try:
        async with aclosing(outputs):
            async for output in outputs:
                if when(output):
                    release()
                yield output
    finally:
        release()


class RefuseBeforeStream:
    """Answers 413 or 503 where the route's own answer to a refusal would come too late.

    Without a fence or a gate that refuses this does nothing.

    Args:
        app: that answers.
        shared: this process's view of its server's state.
    """

    def __init__(self, app: ASGIApp, *, shared: SharedState) -> None:
        self._app, self._shared = app, shared
        self._board = GateBoard(shared.runtime_dir)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._may_refuse():
            await self._app(scope, receive, send)
            return
        held = HeldAnswer(send)
        _held.set(held)
        told = False

        async def tell_refusal() -> None:
            nonlocal told
            if held.refusal is not None and not told:
                told = True
                await held.refusal(scope, receive, send)

        async def pass_on(message: Message) -> None:
            await held.send(message)
            # Before the route returns: after its streams SGLang first waits for 2 s.
            if message["type"] == "http.response.body" and not message.get("more_body"):
                await tell_refusal()

        try:
            await self._app(scope, receive, pass_on)
        except Exception:  # a refusal may end the route that would have streamed
            if held.refusal is None:
                raise
        await tell_refusal()

    def _may_refuse(self) -> bool:
        if self._shared.read().fence is not None:
            return True
        status = self._board.read()
        return status is not None and status.limits.enforced
