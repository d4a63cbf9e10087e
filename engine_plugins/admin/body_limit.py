"""A bound on request bodies, before any of a body is parsed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine_plugins.admin.error_responses import problem

__all__ = ["BodyLimit"]

SILENCE_S = 30.0
"""How long a body may send nothing, before its connection is closed."""


class BodyLimit:
    """Reads a body up to its limit and hands it on whole, or answers 413, or 408 if it stalls.

    Args:
        app: what comes behind.
        limit_bytes: the limit of a request.
    """

    def __init__(self, app: ASGIApp, limit_bytes: Callable[[Scope], int]) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit_bytes(scope)
        declared = _content_length(scope)
        try:
            body = None if declared > limit else await _read(receive, limit)
        except ClientDisconnect:
            return  # half a body says nothing, and nobody waits for an answer
        except TimeoutError:
            await _stalled()(scope, receive, send)
            return
        if body is None:
            answer = problem(
                413,
                "body_too_large",
                f"the body is over this route's limit of {limit} bytes"
                + (f" (it declares {declared})" if declared > limit else ""),
                remedy="send less, gzip it, or raise the limit in the server's settings",
                headers={"Connection": "close"},
            )
            await answer(scope, receive, send)
            return
        await self._app(_as_json(scope), _replay(body, receive), send)


def _stalled() -> ASGIApp:
    return problem(
        408,
        "body_stalled",
        f"nothing of the body came for {SILENCE_S:g} s, and it is not whole",
        remedy="send it again, on a new connection",
        headers={"Connection": "close"},
    )


def _as_json(scope: Scope) -> Scope:
    """Take a body of no stated kind, or of curl's default one, for the JSON that it is."""
    headers = list(scope["headers"])
    kind = next((value for name, value in headers if name == b"content-type"), b"")
    if kind not in (b"", b"application/x-www-form-urlencoded"):
        return scope
    headers = [pair for pair in headers if pair[0] != b"content-type"]
    return {**scope, "headers": [*headers, (b"content-type", b"application/json")]}


async def _read(receive: Receive, limit: int) -> bytes | None:
    chunks: list[bytes] = []
    size = 0
    clock = asyncio.get_running_loop().time
    async with asyncio.timeout(SILENCE_S) as silence:
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientDisconnect
            # One timer for all chunks: wait_for would make a task for each of thousands.
            silence.reschedule(clock() + SILENCE_S)
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                return None
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0
