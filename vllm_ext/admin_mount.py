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
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers import app as launcher_app
from vllm.utils.import_utils import resolve_obj_by_qualname

from engine_plugins.admin.app import PREFIX as ADMIN_PREFIX
from engine_plugins.admin.app import create_admin_app
from engine_plugins.admin.error_responses import problem, problem_from
from engine_plugins.admin.service import AdminService
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.errors import EnginePluginError
from engine_plugins.settings import PREFIX, Settings
from vllm_ext.engine_control import VllmEngineControl

__all__ = ["EndpointPlugin", "endpoint_plugin", "hook_app"]

logger = logging.getLogger(__name__)

EXTENSION = "vllm_ext.worker_extension.EnginePluginsWorkerExtension"


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
        mount(app)

    attach_endpoint_plugins.engine_plugins_hooked = True  # type: ignore[attr-defined]
    launcher_app.attach_endpoint_plugins = attach_endpoint_plugins


def mount(app: FastAPI) -> None:
    """Mount once, and only on a server whose workers have our extension."""
    if not _has_extension(app.state.args):
        return
    if any(isinstance(route, Mount) and route.path == ADMIN_PREFIX for route in app.routes):
        return
    app.mount(ADMIN_PREFIX, _LateAdmin(app))
    logger.info("admin routes are at %s", ADMIN_PREFIX)


def _has_extension(args: Namespace) -> bool:
    name = getattr(args, "worker_extension_cls", "") or ""
    return bool(name) and hasattr(resolve_obj_by_qualname(name), "engine_plugins_call")


class _LateAdmin:
    """The admin application, built at its first request: only then is there an engine."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._admin: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._admin is None:
            client = getattr(self._app.state, "engine_client", None)
            if client is None:
                answer = problem(503, "not_configured", "the engine is still starting")
                await answer(scope, receive, send)
                return
            try:
                self._admin = _admin_app(client)
            except EnginePluginError as error:
                await problem_from(error, state=None)(scope, receive, send)
                return
        await self._admin(scope, receive, send)


def _admin_app(client: Any) -> Any:
    overrides = (client.vllm_config.additional_config or {}).get("engine_plugins", {})
    settings = Settings.load(overrides)
    shared = SharedState(Path(os.environ[PREFIX + "RUNTIME_DIR"]))
    return create_admin_app(AdminService(VllmEngineControl(client), shared, settings), settings)
