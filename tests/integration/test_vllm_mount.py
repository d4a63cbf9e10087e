"""The two ways in which the routes join vLLM's application, both at once."""

from __future__ import annotations

import pytest

from tests.integration.conftest import StartServer
from tests.support.live_models import LiveModel

pytestmark = pytest.mark.engine


def test_each_api_server_has_the_routes_once(start_server: StartServer) -> None:
    """The general plugin and the official hook are both on; each process mounts one time."""
    model = LiveModel(kind="qwen3_live", version=0)
    official = {"VLLM_PLUGINS": "engine_plugins"}
    with start_server(model, api_servers=2, environment=official, preload=True) as server:
        assert {server.state()["state"] for _ in range(10)} == {"serving"}
        log = server.log.read_text(errors="replace")
    mounted = [line for line in log.splitlines() if "admin routes are at /admin/v1" in line]
    assert len(mounted) == 2, mounted
