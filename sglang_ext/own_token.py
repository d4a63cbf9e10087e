"""The admin routes within SGLang's application, under our token alone.

SGLang's key check finds the level of a route by its endpoint and knows none for "has a key of its
own". So the routes are registered as ones that need SGLang's admin key, and a layer outside that
check takes requests for them straight to our own. Should that layer ever be missing, they are
closed twice instead of open once.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from sglang.srt.utils.auth import AuthLevel, auth_level
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from engine_plugins.admin.mount import PREFIX, AdminMount

__all__ = ["AdminRoutes"]

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]


class AdminRoutes:
    """Where requests for the admin application go.

    Args:
        admin: the admin application; it checks our token.
    """

    def __init__(self, admin: ASGIApp) -> None:
        self._mount = AdminMount(admin)

    def register(self, app: FastAPI) -> None:
        """Make the routes known to SGLang's application.

        By `add_api_route`: endpoints of an included router are hidden from SGLang's key check,
        which then takes them for ordinary ones.
        """

        @auth_level(AuthLevel.ADMIN_FORCE)
        async def admin_route(request: Request) -> Response:
            return _Answer(self)

        for path in (PREFIX, PREFIX + "/{path:path}"):
            app.add_api_route(path, admin_route, methods=METHODS, include_in_schema=False)

    def pass_key_check(self, app: FastAPI) -> None:
        """Take requests for the routes past SGLang's keys, once its check is in the application."""
        app.add_middleware(_PastKeyCheck, routes=self)

    async def answered(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Have the admin application answer, if the path is one of its own."""
        match, found = self._mount.matches(scope)
        if match is not Match.FULL:
            return False
        await self._mount.handle({**scope, **found}, receive, send)
        return True


class _Answer(Response):
    """An answer that the admin application gives."""

    def __init__(self, routes: AdminRoutes) -> None:
        super().__init__()
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._routes.answered(scope, receive, send)


class _PastKeyCheck:
    """The layer outside SGLang's key check; what is not for us goes on as it came."""

    def __init__(self, app: ASGIApp, routes: AdminRoutes) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not await self._routes.answered(scope, receive, send):
            await self._app(scope, receive, send)
