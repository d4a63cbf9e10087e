"""The admin application: auth, then the body limit, then the routes."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engine_plugins.admin.auth import BearerAuth
from engine_plugins.admin.body_limit import BodyLimit
from engine_plugins.admin.document import DocumentedApi
from engine_plugins.admin.error_responses import problem, problem_from
from engine_plugins.admin.http_manners import HttpManners
from engine_plugins.admin.last_resort import LastResort, internal_problem
from engine_plugins.admin.mount import PREFIX
from engine_plugins.admin.route_table import RouteTable
from engine_plugins.admin.routes import (
    BATCH_PATH,
    CONNECT_PATH,
    SCOPES,
    SOURCES_PATH,
    admin_router,
)
from engine_plugins.admin.service import AdminService
from engine_plugins.admin.sources import CONNECT_BYTES
from engine_plugins.admin.token_book import TokenBook
from engine_plugins.admin.update_answers import StoredFailure
from engine_plugins.errors import EnginePluginError, ResidualMemoryError
from engine_plugins.settings import Settings

__all__ = ["create_admin_app"]

_DOCUMENT = ("GET", "/openapi.json")
_SHOWN = 80
"""Characters of a field's name."""


def create_admin_app(service: AdminService, settings: Settings) -> ASGIApp:
    """The whole admin contract as one ASGI application, to be mounted at `PREFIX`."""
    router = admin_router(service, max_manifest_bytes=settings.max_manifest_bytes)
    app = DocumentedApi(router.routes, SCOPES)
    _answer_errors(app, service)

    routes = RouteTable(app.routes)

    def limit(scope: Scope) -> int:
        route = routes.find(scope)
        if route == ("POST", CONNECT_PATH):
            return max(settings.max_body_bytes, CONNECT_BYTES)
        sources = route in (("POST", SOURCES_PATH), ("POST", BATCH_PATH))
        return settings.max_manifest_bytes if sources else settings.max_body_bytes

    guarded = BearerAuth(
        BodyLimit(app, limit),
        TokenBook(settings),
        routes=routes,
        scopes={**SCOPES, _DOCUMENT: None},
        state_name=lambda: service.state_name,
    )
    return HttpManners(LastResort(_BelowMount(guarded)))


class _BelowMount:
    """Gives paths their root path back where a proxy took it away.

    Starlette's mounts add themselves to the root path, and what is inside a mount then expects
    the whole of it in front of the path: without this every route is unknown behind such a proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root, path = scope.get("root_path", ""), scope.get("path", "")
        if root and not path.startswith(f"{root}/"):
            mounted_at = root.removeprefix(scope.get("app_root_path", ""))
            scope = {**scope, "path": root + path.removeprefix(mounted_at)}
        await self._app(scope, receive, send)


def _answer_errors(app: FastAPI, service: AdminService) -> None:
    @app.exception_handler(EnginePluginError)
    async def ours(request: Request, error: EnginePluginError) -> Response:
        if isinstance(error, StoredFailure):
            return problem(
                error.status,
                error.failed_with,
                error.message,
                remedy=error.remedy,
                state=service.state_name,
            )
        more = {"memory": error.memory} if isinstance(error, ResidualMemoryError) else {}
        return problem_from(error, state=service.state_name, **more)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        parts = (str(part)[:_SHOWN] for part in first["loc"] if part != "body")
        where = ".".join(parts) or "the body"
        return _malformed(f"{where}: {first['msg']}", service)

    # Without this one Starlette answers in plain text before the last resort can.
    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return internal_problem(error, state=service.state_name)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == HTTPStatus.BAD_REQUEST:
            return _malformed(str(error.detail), service)
        raise error


def _malformed(detail: str, service: AdminService) -> Response:
    """400, with no more of the body's own words than help to find the place."""
    return problem(
        400,
        "malformed_request",
        detail[: 4 * _SHOWN],
        remedy=f"see {PREFIX}/openapi.json",
        state=service.state_name,
    )
