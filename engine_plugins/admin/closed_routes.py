"""An engine's own routes that would move it behind the admin state: they answer 409 and name ours.

While an engine carries the admin routes, these are the only ones that pause, resume, sleep, wake,
update or label it. A route of the engine's own that did the same would leave the state page behind:
the page says `asleep` and discarded weights serve, or `serving` and nobody is answered.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from engine_plugins.admin.error_responses import problem

__all__ = ["closed_routes"]


def closed_routes(engine: str, instead: Mapping[str, str]) -> list[Route]:
    """Routes for the front of an engine's route table, where they are found first.

    They are routes of the engine's own router, so that every spelling of a path which the router
    would take for the engine's route is taken for the closed one.

    Args:
        engine: its name, as messages say it.
        instead: what to do instead, by the path of the engine's route; all methods are closed.
    """
    return [
        Route(path, _Closed(engine, path, remedy), include_in_schema=False)
        for path, remedy in instead.items()
    ]


class _Closed:
    """The 409 of one route, before any of the request's body is read."""

    __name__ = "closed_route"
    """As a function has one: vLLM's log lists the endpoints of all routes by it."""

    def __init__(self, engine: str, path: str, remedy: str) -> None:
        self._answer = problem(
            409,
            "closed_route",
            f"{engine}'s own {path} is closed on this server: GET /admin/v1/state would not know "
            "what it has done to the engine",
            remedy=remedy,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)
