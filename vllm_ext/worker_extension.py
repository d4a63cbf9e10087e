"""The class that `--worker-extension-cls` names: one method that carries every call.

vLLM appends it to the bases of its worker; `__init__` is never called, and any name that the
worker already has would be refused.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from vllm.config import set_current_vllm_config

from engine_plugins.admin.runtime_dir import RUNTIME_DIR, hold_runtime_dir
from engine_plugins.engine_rank import make_rank_service
from engine_plugins.errors import EngineCallError, EnginePluginError
from engine_plugins.settings import Settings
from engine_plugins.weights.receiving.worker_messages import refuse
from engine_plugins.weights.receiving.worker_service import WorkerService
from vllm_ext.draft_model import draft_of
from vllm_ext.engine_memory import memory_backend, tagged_tensors
from vllm_ext.hooks import install, speak_through_vllm
from vllm_ext.memory_baseline import memory_of
from vllm_ext.weight_installer import VllmWeightInstaller

__all__ = ["EnginePluginsWorkerExtension"]

logger = logging.getLogger(__name__)

_SERVICE = "_engine_plugins_service"

# A worker resolves its extension before it loads the model: only workers with ours are measured.
speak_through_vllm()
install("vllm_ext.memory_baseline", "hook_load_model", needed=False)


class EnginePluginsWorkerExtension:
    """Added to every vLLM worker."""

    def engine_plugins_call(self, call: str, arguments: bytes) -> bytes:
        """Answer one call of `weights.worker_service`; never raises.

        An exception here would leave the answers of the ranks after this one unread, and vLLM
        would take them for those of the next call.
        """
        try:
            service: WorkerService | None = getattr(self, _SERVICE, None)
            if service is None:
                service = _make_service(self)
                setattr(self, _SERVICE, service)
            with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
                return service.call(call, arguments)
        except EnginePluginError as error:
            return refuse(error)
        except Exception as error:  # of torch, of psutil, of vLLM: whatever its kind
            logger.exception("%s failed", call)
            what = f"{call}: {type(error).__name__}: {error}"
            return refuse(EngineCallError(what, remedy="see the engine's log"))


def _make_service(worker: Any) -> WorkerService:
    config = worker.vllm_config
    settings = Settings.load((config.additional_config or {}).get("engine_plugins", {}))
    runner = worker.model_runner
    tensors = tagged_tensors(worker)
    runtime_dir = os.environ.get(RUNTIME_DIR)
    if runtime_dir is not None:
        hold_runtime_dir()
    return make_rank_service(
        VllmWeightInstaller(config, runner.get_model(), draft_of(runner, config)),
        memory_of(worker),
        tp_size=int(config.parallel_config.tensor_parallel_size),
        settings=settings,
        runtime_dir=None if runtime_dir is None else Path(runtime_dir),
        backend=memory_backend(worker, tensors, settings),
        tensors=tensors,
    )
