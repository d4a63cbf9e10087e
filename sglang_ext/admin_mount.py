"""Where the admin routes join SGLang's application, under our token alone.

SGLang's key check finds the level of a route by its endpoint and knows none for "has a key of its
own". So the routes are registered as ones that need SGLang's admin key, and a layer outside that
check takes requests for them straight to our own. Should that layer ever be missing, they are
closed twice instead of open once.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from fastapi import FastAPI, Request
from sglang.srt.entrypoints import http_server
from sglang.srt.utils.auth import AuthLevel, auth_level
from starlette.responses import Response
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from engine_plugins.admin.app import PREFIX
from engine_plugins.admin.engine_control import EngineControl
from engine_plugins.admin.late_admin import LateAdmin
from engine_plugins.settings import Settings
from sglang_ext.admission_hook import RefuseBeforeStream
from sglang_ext.engine_control import SglangEngineControl
from sglang_ext.roll_call import absences
from sglang_ext.scheduler_calls import SchedulerCalls
from sglang_ext.server_flags import refuse_to_start

__all__ = ["add_routes", "after_key_check", "before_http_server"]

logger = logging.getLogger(__name__)

APP_PATH = "SGLANG_HTTP_SERVER_APP_PATH"
"""SGLang's variable for the application that further API processes serve."""
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]


def before_http_server(server_args: Any, tokenizer_manager: Any, *args: Any, **kwargs: Any) -> None:
    """Before `_setup_and_run_http_server`, when the schedulers are up."""
    wrong = absences(server_args.tp_size)
    if server_args.tokenizer_worker_num > 1:
        os.environ[APP_PATH] = "sglang_ext.http_app:app"
    elif SchedulerCalls.of(tokenizer_manager) is None:
        wrong.append("the tokenizer manager has no connection of ours")
    if wrong:
        refuse_to_start("; ".join(wrong))
    add_routes(http_server.app)
    logger.info("admin routes are at %s", PREFIX)


def after_key_check(result: None, app: FastAPI, **keys: Any) -> None:
    """After `add_api_key_middleware`: whatever comes later lies outside of it."""
    app.add_middleware(_OwnToken)


def add_routes(app: FastAPI) -> None:
    """Register the admin routes and the refusals of a fenced engine."""
    app.add_api_route(
        PREFIX + "/{path:path}", _admin_route, methods=METHODS, include_in_schema=False
    )
    app.add_middleware(RefuseBeforeStream)


@auth_level(AuthLevel.ADMIN_FORCE)
async def _admin_route(request: Request) -> Response:
    """Every admin route, as SGLang's own application sees them."""
    return _Admin()


class _Admin(Response):
    """An answer that the admin application gives."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _below_prefix(scope, receive, send)


class _OwnToken:
    """Takes requests for our routes past SGLang's keys; all others go on as they came."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not await _below_prefix(scope, receive, send):
            await self._app(scope, receive, send)


def _find_engine() -> tuple[EngineControl, Settings] | None:
    state = http_server.get_global_state()
    calls = None if state is None else SchedulerCalls.of(state.tokenizer_manager)
    if state is None or calls is None:
        return None
    return SglangEngineControl(state.tokenizer_manager, calls), Settings.load()


_MOUNT = Mount(PREFIX, app=LateAdmin(_find_engine))


async def _below_prefix(scope: Scope, receive: Receive, send: Send) -> bool:
    """Have the admin application answer, if the path is one of its own."""
    match, found = _MOUNT.matches(scope)
    if match is not Match.FULL:
        return False
    await _MOUNT.handle({**scope, **found}, receive, send)
    return True
