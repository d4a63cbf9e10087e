"""Which routes of vLLM's own are closed, and what to call instead.

Most of them are there in development mode only (VLLM_SERVER_DEV_MODE=1). What reads, flushes a
cache, aborts requests, profiles or loads adapters stays open.
"""

from __future__ import annotations

from fastapi import FastAPI

from engine_plugins.admin.closed_routes import closed_routes

__all__ = ["INSTEAD", "close_routes"]

_UPDATE = "install weights by POST /admin/v1/weights/update; WeightSender does it"
_CONNECT = "offer weights by POST /admin/v1/weights/sources and /admin/v1/weights/connect"
_RESTART = "restart the server with the parallel sizes that it is to have"

INSTEAD = {
    "/pause": "POST /admin/v1/pause",
    "/resume": "POST /admin/v1/resume",
    "/sleep": "POST /admin/v1/sleep",
    "/wake_up": "POST /admin/v1/wake",
    "/release_kv_cache_memory": 'POST /admin/v1/sleep with {"tags": ["kv_cache"]}',
    "/init_weight_transfer_engine": _CONNECT,
    "/shutdown_weight_transfer_engine": _CONNECT,
    "/start_weight_update": _UPDATE,
    "/start_draft_weight_update": _UPDATE,
    "/update_weights": _UPDATE,
    "/finish_weight_update": _UPDATE,
    "/update_weight_version": _UPDATE,
    # It resets weights too.
    "/weight_checker": "GET /admin/v1/weights tells the installed version",
    # It calls any method of a worker, such as those that load or discard weights.
    "/collective_rpc": "call the admin route of what you want; /admin/v1/openapi.json lists them",
    "/scale_elastic_ep": _RESTART,
    "/fault_tolerance/apply": _RESTART,
}
"""What to do instead, by the path of a closed route."""


def close_routes(app: FastAPI) -> None:
    """Answer 409 on each of them, whether or not this server has it."""
    app.router.routes[:0] = closed_routes("vLLM", INSTEAD)
