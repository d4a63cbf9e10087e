"""Which routes of SGLang's own are closed, and what to call instead.

SGLang opens them to everybody where it has no key, and with several API processes it takes none.
What reads, flushes a cache, aborts requests, profiles or loads adapters stays open.
"""

from __future__ import annotations

from fastapi import FastAPI
from sglang.srt.utils.auth import AuthLevel, auth_level

from engine_plugins.admin.closed_routes import closed_routes

__all__ = ["INSTEAD", "close_routes"]

_UPDATE = "install weights by POST /admin/v1/weights/update; WeightSender does it"
_CONNECT = "offer weights by POST /admin/v1/weights/sources and /admin/v1/weights/connect"
_RESTART = "restart the server with the sizes and the role that it is to have"

INSTEAD = {
    "/pause_generation": "POST /admin/v1/pause",
    "/continue_generation": "POST /admin/v1/resume",
    # It lets the scheduler sleep before each step, for as long as its caller says.
    "/slow_down": "POST /admin/v1/pause",
    "/release_memory_occupation": "POST /admin/v1/sleep",
    "/resume_memory_occupation": "POST /admin/v1/wake",
    "/begin_weight_update": _UPDATE,
    "/end_weight_update": _UPDATE,
    "/update_weights_from_disk": _UPDATE,
    "/update_weights_from_distributed": _UPDATE,
    "/update_weights_from_ipc": _UPDATE,
    "/update_weights_from_tensor": _UPDATE,
    "/update_weight_version": _UPDATE,
    # It resets weights too.
    "/weights_checker": "GET /admin/v1/weights tells the installed version",
    "/init_weights_update_group": _CONNECT,
    "/destroy_weights_update_group": _CONNECT,
    "/init_weights_send_group_for_remote_instance": _CONNECT,
    "/send_weights_to_remote_instance": _CONNECT,
    "/pd_role_switch": _RESTART,
    "/scale_elastic_ep": _RESTART,
}
"""What to do instead, by the path of a closed route."""


def close_routes(app: FastAPI) -> None:
    """Answer 409 on each of them, to those whom SGLang's key check lets through to it."""
    closed = closed_routes("SGLang", INSTEAD)
    for route in closed:
        auth_level(AuthLevel.ADMIN_OPTIONAL)(route.endpoint)
    app.router.routes[:0] = closed
