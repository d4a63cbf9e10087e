"""A fenced engine takes no request: 503 before any stream opens, and for those held here.

SGLang holds new requests of a paused engine in its API process; they never reached a scheduler
that could end them.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine_plugins.admin.error_responses import problem
from engine_plugins.admin.runtime_dir import shared_state
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import EngineState, refusal

__all__ = ["RefuseBeforeStream", "generate_request"]

LOOK_AGAIN_S = 0.25
"""How often a request of a paused engine looks whether the engine has been fenced."""
HOLDING_POLL_S = 0.02

_SHOWN = "engine_plugins_version"
_shared = functools.cache(shared_state)

_refused: ContextVar[list[str] | None] = ContextVar("engine_plugins_refused", default=None)
"""Why the HTTP request that is being answered was refused, for `RefuseBeforeStream`."""


async def generate_request(
    original: Any, manager: Any, request: Any, *args: Any, **kwargs: Any
) -> AsyncGenerator[Any, None]:
    """Around `TokenizerManager.generate_request`, through which every route generates."""
    await _admitted(manager, _shared(), request)
    async with aclosing(original(manager, request, *args, **kwargs)) as outputs:
        async for output in outputs:
            yield output


def _is_health_check(request: Any) -> bool:
    """SGLang's own probe; it waits out a pause, and nobody listens for an error of it."""
    return isinstance(request.rid, str) and request.rid.startswith(HEALTH_CHECK_RID_PREFIX)


async def _admitted(manager: Any, shared: SharedState, request: Any) -> None:
    """Wait as long as SGLang is paused, or drains before it pauses.

    Raises:
        HTTPException: 503, when the engine is fenced or is being fenced meanwhile.
        _StreamRefusedError: the same, for a request whose answer may have begun.
    """
    while True:
        state = shared.read()
        why = refusal(state)
        if why is not None and not _is_health_check(request):
            raise _refused_with(why, request)
        if state.holding:
            await asyncio.sleep(HOLDING_POLL_S)
        elif manager.is_pause:
            await _resumed(manager)
        else:
            _show_version(manager, state)
            return


class _StreamRefusedError(ValueError):
    """What SGLang's streams turn into a last event, with this status in it."""

    status_code = HTTPStatus.SERVICE_UNAVAILABLE


def _refused_with(why: str, request: Any) -> Exception:
    note = _refused.get()
    if note is not None:
        note.append(why)
    if not getattr(request, "stream", False):
        return HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, why)
    # SGLang does it first of all; what a route runs after a stream asks for the outcome.
    request.normalize_batch_and_arguments()
    return _StreamRefusedError(why)


async def _resumed(manager: Any) -> None:
    """Wait for SGLang's own signal, but not for long: a fence gives none."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LOOK_AGAIN_S), manager.is_pause_cond:
            await manager.is_pause_cond.wait_for(lambda: not manager.is_pause)


def _show_version(manager: Any, state: EngineState) -> None:
    """Label this API process's answers, where another one has published a new version."""
    version = state.weights.version
    if version is not None and getattr(manager, _SHOWN, None) != version:
        manager._update_weight_version_if_provided(str(version))
        setattr(manager, _SHOWN, version)


class RefuseBeforeStream:
    """Answers 503 where a fenced engine's refusal would come too late.

    A streaming route sends its 200 before it asks for the first token. While the engine is
    fenced that start is kept back until the route has either sent something or been refused.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._shared = _shared()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._shared.read().fence is None:
            await self._app(scope, receive, send)
            return
        refused: list[str] = []
        _refused.set(refused)
        kept: list[Message] = []

        async def watched(message: Message) -> None:
            if refused:
                return
            if message["type"] == "http.response.start":
                kept.append(message)
                return
            while kept:
                await send(kept.pop(0))
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if refused:
                answer = problem(503, "fenced", refused[0], state="fenced")
                await answer(scope, receive, send)
