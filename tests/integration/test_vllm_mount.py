"""The two ways in which the routes join vLLM's application, both at once."""

from __future__ import annotations

from tests.support.configurations import DENSE_TP2, OLD, on
from tests.support.engines import VLLM, only
from tests.support.served import Served

pytestmark = [only(VLLM), on(DENSE_TP2)]


def test_each_api_server_has_the_routes_once(served: Served) -> None:
    """The general plugin and the official hook are both on; each process mounts one time."""
    served.restore(OLD)
    assert {served.server.state()["state"] for _ in range(10)} == {"serving"}
    log = served.server.log.read_text(errors="replace")
    mounted = [line for line in log.splitlines() if "admin routes are at /admin/v1" in line]
    assert len(mounted) == served.configuration.api_servers == 2, mounted
