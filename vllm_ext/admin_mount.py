"""Where the admin routes join vLLM's application.

Two ways lead here, and a server that takes both mounts once: the general plugin wraps vLLM's own
hook for endpoint plugins (so `--worker-extension-cls` alone is enough), and the official
`vllm.endpoint_plugins` entry point, for those who name it in VLLM_PLUGINS.
"""

from __future__ import annotations

import functools
import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.middleware import Middleware
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers import app as launcher_app

from engine_plugins.admin.engine_control import EngineControl
from engine_plugins.admin.held_answer import RefuseBeforeStream
from engine_plugins.admin.late_admin import LateAdmin
from engine_plugins.admin.mount import PREFIX, AdminMount
from engine_plugins.admin.runtime_dir import RUNTIME_DIR, shared_state
from engine_plugins.admin.server_end import end_with_first_process
from engine_plugins.prefill_gate.metrics import tell_gate_metrics
from engine_plugins.settings import Settings
from vllm_ext.asked import has_extension
from vllm_ext.closed_routes import close_routes
from vllm_ext.engine_control import VllmEngineControl
from vllm_ext.hooks import require_installed
from vllm_ext.prefill_refusal import answer_refusals
from vllm_ext.versions import VLLM

__all__ = ["EndpointPlugin", "endpoint_plugin", "hook_app"]

logger = logging.getLogger(__name__)


class EndpointPlugin:
    """vLLM's official hook for routes."""

    name = "engine_plugins"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Mount the admin routes."""
        mount(app)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Nothing to do: the routes find the engine in the application's state."""


def endpoint_plugin() -> EndpointPlugin:
    """Entry point of group `vllm.endpoint_plugins`."""
    return EndpointPlugin()


def hook_app() -> None:
    """Have every application that vLLM builds in this process mount the admin routes."""
    original = launcher_app.attach_endpoint_plugins
    if hasattr(original, "engine_plugins_hooked"):
        return

    @functools.wraps(original)
    def attach_endpoint_plugins(app: FastAPI, *args: Any, **kwargs: Any) -> None:
        original(app, *args, **kwargs)
        answer_refusals(app)
        mount(app)

    attach_endpoint_plugins.engine_plugins_hooked = True  # type: ignore[attr-defined]
    launcher_app.attach_endpoint_plugins = attach_endpoint_plugins


def mount(app: FastAPI) -> None:
    """Mount once, and only on a server whose workers have our extension."""
    if not has_extension(getattr(app.state.args, "worker_extension_cls", None)):
        return
    require_installed()
    if any(isinstance(route, AdminMount) for route in app.routes):
        return
    admin = LateAdmin(functools.partial(_find_engine, app))
    app.router.routes.append(AdminMount(admin))
    admin.watch_beside(app)
    end_with_first_process(Path(os.environ[RUNTIME_DIR]))
    close_routes(app)
    # Innermost, so that vLLM's own middleware sees the status of a refusal and counts it.
    app.user_middleware.append(Middleware(RefuseBeforeStream, shared=shared_state()))
    tell_gate_metrics(Path(os.environ[RUNTIME_DIR]))
    logger.info("admin routes are at %s", PREFIX)
    if VLLM.warning() is not None:
        logger.warning(VLLM.warning())


def _find_engine(app: FastAPI) -> tuple[EngineControl, Settings] | None:
    client = getattr(app.state, "engine_client", None)
    if client is None:
        return None
    overrides = (client.vllm_config.additional_config or {}).get("engine_plugins", {})
    return VllmEngineControl(client), Settings.load(overrides)
