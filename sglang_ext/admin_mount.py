"""Where the admin routes join SGLang's application, in each of its API processes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from sglang.srt.entrypoints import http_server

from engine_plugins.admin.engine_control import EngineControl
from engine_plugins.admin.held_answer import RefuseBeforeStream
from engine_plugins.admin.late_admin import LateAdmin
from engine_plugins.admin.mount import PREFIX
from engine_plugins.admin.runtime_dir import RUNTIME_DIR, shared_state
from engine_plugins.prefill_gate.metrics import tell_gate_metrics
from engine_plugins.settings import Settings
from sglang_ext.closed_routes import close_routes
from sglang_ext.engine_control import SglangEngineControl
from sglang_ext.own_token import AdminRoutes
from sglang_ext.roll_call import absences
from sglang_ext.scheduler_calls import SchedulerCalls
from sglang_ext.server_flags import refuse_to_start

__all__ = ["add_routes", "after_key_check", "before_http_server"]

logger = logging.getLogger(__name__)

APP_PATH = "SGLANG_HTTP_SERVER_APP_PATH"
"""SGLang's variable for the application that further API processes serve."""


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
    """After `add_api_key_middleware`: what is added from here on lies outside of it."""
    _routes.pass_key_check(app)


def add_routes(app: FastAPI) -> None:
    """Register the admin routes, close SGLang's own, and tell the gate's series."""
    _routes.register(app)
    _admin.watch_beside(app)
    close_routes(app)
    tell_gate_metrics(Path(os.environ[RUNTIME_DIR]))
    app.add_middleware(RefuseBeforeStream, shared=shared_state())


def _find_engine() -> tuple[EngineControl, Settings] | None:
    state = http_server.get_global_state()
    calls = None if state is None else SchedulerCalls.of(state.tokenizer_manager)
    if state is None or calls is None:
        return None
    return SglangEngineControl(state.tokenizer_manager, calls), Settings.load()


_admin = LateAdmin(_find_engine)
_routes = AdminRoutes(_admin)
