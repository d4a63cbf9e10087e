"""What HTTP asks of every answer, whichever layer gives it: a request id, and HEAD as GET."""

from __future__ import annotations

import logging
import re
import time
from contextvars import ContextVar
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["REQUEST_ID", "HttpManners"]

logger = logging.getLogger(__name__)

REQUEST_ID: ContextVar[str] = ContextVar("engine_plugins_request_id", default="-")
"""Of the request that is served, for lines of the log."""

_HEADER = b"x-request-id"
_SANE_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_OF_STRANGERS = frozenset({401, 403, 404, 405})
"""Statuses that anybody can bring about, as often as they like: not for the log."""


class HttpManners:
    """Echoes `X-Request-Id`, or makes one up, and answers HEAD as GET without the body.

    What may have changed something, or failed, is a line of the log with that id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, method, began = _request_id(scope), scope["method"], time.monotonic()
        REQUEST_ID.set(request_id.decode("ascii"))
        inner = {**scope, "method": "GET"} if method == "HEAD" else scope

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (_HEADER, request_id)]
                message = {**message, "headers": headers}
                _log(scope, message["status"], time.monotonic() - began)
            elif method == "HEAD" and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app(inner, receive, answer)


def _log(scope: Scope, status: int, seconds: float) -> None:
    reads = scope["method"] in ("GET", "HEAD") and status < 500
    if reads or status in _OF_STRANGERS:
        return
    logger.info(
        "%s %.200r: %d after %.3f s (request %s)",
        *(scope["method"], scope["path"], status, seconds, REQUEST_ID.get()),
    )


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == _HEADER and _SANE_ID.fullmatch(value):
            return bytes(value)
    return uuid4().hex.encode()
