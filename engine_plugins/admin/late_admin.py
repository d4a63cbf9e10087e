"""The admin application for servers that take routes before they have an engine."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from engine_plugins.admin.app import create_admin_app
from engine_plugins.admin.engine_control import EngineControl
from engine_plugins.admin.error_responses import problem, problem_from
from engine_plugins.admin.http_manners import HttpManners
from engine_plugins.admin.runtime_dir import shared_state
from engine_plugins.admin.service import AdminService
from engine_plugins.errors import EnginePluginError
from engine_plugins.settings import Settings

__all__ = ["LateAdmin"]


class LateAdmin:
    """Builds the admin application at its first request.

    Args:
        find_engine: the engine of this process and the settings, or None while there is none.
    """

    def __init__(self, find_engine: Callable[[], tuple[EngineControl, Settings] | None]) -> None:
        self._find_engine = find_engine
        self._admin: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            admin = self._built()
        except EnginePluginError as error:
            await HttpManners(problem_from(error, state=None))(scope, receive, send)
            return
        if admin is None:
            admin = HttpManners(_starting())
        await admin(scope, receive, send)

    def _built(self) -> ASGIApp | None:
        if self._admin is None:
            found = self._find_engine()
            if found is not None:
                control, settings = found
                service = AdminService(control, shared_state(), settings)
                self._admin = create_admin_app(service, settings)
        return self._admin


def _starting() -> ASGIApp:
    return problem(
        503,
        "not_configured",
        "the engine is still starting",
        remedy="try again once it answers requests",
        headers={"Retry-After": "5"},
    )
