"""The method in vLLM's worker answers, whatever goes wrong on the way to the service."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine_plugins.errors import EngineCallError, EnginePluginError, SettingsError
from engine_plugins.weights.receiving.worker_messages import (
    WorkerDescription,
    encode_call,
    read_answer,
)
from vllm_ext import worker_extension
from vllm_ext.worker_extension import EnginePluginsWorkerExtension


class Worker(EnginePluginsWorkerExtension):
    """A worker as vLLM makes it: without our `__init__`.

    Args:
        additional_config: of its server.
    """

    def __init__(self, additional_config: object = None) -> None:
        self.vllm_config = SimpleNamespace(additional_config=additional_config)


def ask(worker: Any) -> WorkerDescription:
    return read_answer(worker.engine_plugins_call("describe", encode_call()), WorkerDescription)


@pytest.mark.parametrize(
    ("worker", "error", "told"),
    [
        (Worker(), EngineCallError, "describe: AttributeError: .*model_runner"),
        (Worker({"engine_plugins": "x"}), SettingsError, "is a str"),
        (Worker("x"), EngineCallError, "describe: AttributeError"),
    ],
)
def test_an_error_before_the_service_is_an_answer(
    worker: Worker, error: type[EnginePluginError], told: str
) -> None:
    """Raised, it would leave the answers of later ranks to the next call."""
    for _ in range(2):
        with pytest.raises(error, match=told):
            ask(worker)


def test_an_error_around_the_service_is_an_answer() -> None:
    """VLLM's own context may raise as well, and so may the service."""
    worker = Worker()

    def call(name: str, arguments: bytes) -> bytes:
        raise UnicodeEncodeError("utf-8", "b\udcff", 0, 1, "surrogates")

    setattr(worker, worker_extension._SERVICE, SimpleNamespace(call=call))
    with pytest.raises(EngineCallError, match="describe: "):
        ask(worker)
