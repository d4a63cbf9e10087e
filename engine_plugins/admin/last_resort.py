"""The outermost layer: a bug of ours is a problem answer and a log line, not the host's trouble."""

from __future__ import annotations

import logging

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine_plugins.admin.error_responses import problem, problem_from
from engine_plugins.admin.http_manners import REQUEST_ID
from engine_plugins.errors import ServerFilesError
from engine_plugins.scarce import explained

__all__ = ["LastResort", "internal_problem"]

logger = logging.getLogger(__name__)


def internal_problem(error: Exception, *, state: str | None = None) -> Response:
    """The answer for what nobody foresaw, and for what the machine has run out of."""
    told = explained(error)
    if isinstance(told, ServerFilesError):
        return problem_from(told, state=state)
    return problem(
        500,
        "internal_error",
        told.message,
        remedy="this is a bug of engine-plugins: report it with the server's log",
        state=state,
    )


class LastResort:
    """Answers 500 where something unforeseen was raised.

    The application that we are mounted in has handlers for its own routes; an exception that
    reached them would meet code that does not know us.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:  # the outermost layer has nobody to raise to
            logger.exception("an admin route failed (request %s)", REQUEST_ID.get())
            if started or scope["type"] != "http":
                return
            await internal_problem(error)(scope, receive, send)
