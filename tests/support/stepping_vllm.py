"""The real worker extension of vLLM, with its installs under watch; see `stepping`."""

from __future__ import annotations

from typing import Any

from tests.support.stepping import watch_installs
from vllm_ext.worker_extension import EnginePluginsWorkerExtension


class SteppingWorkerExtension(EnginePluginsWorkerExtension):
    """The product's extension; its first call also puts the installer under watch."""

    def engine_plugins_call(self, call: str, arguments: bytes) -> bytes:
        first = getattr(self, "_engine_plugins_service", None) is None
        if first:
            super().engine_plugins_call("describe", b"\x80")
            _watch(self)
        return super().engine_plugins_call(call, arguments)


def _watch(worker: Any) -> None:
    watch_installs(worker._engine_plugins_service._receiver._installer, worker.rank)
