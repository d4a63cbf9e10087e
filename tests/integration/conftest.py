"""Real servers, each started once for the tests of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from tests.support.engine_server import EngineServer
from tests.support.live_models import LiveModel
from tests.support.vllm_server import VllmServer, vllm_server

StartServer = Callable[..., AbstractContextManager[VllmServer]]


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> StartServer:
    """Serve a model for as long as a context lasts, from a folder of its own."""

    def start(model: LiveModel, **options: Any) -> AbstractContextManager[VllmServer]:
        folder = tmp_path_factory.mktemp("server")
        served = model.copy_to(folder / "model")
        return vllm_server(served, folder / "server.log", **options)

    return start


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show the server's last words with a failure."""
    outcome: Any = yield
    report = outcome.get_result()
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(server, EngineServer) and server.log.exists():
        report.sections.append(("end of the server's log", server.log_tail()))
