"""What a vLLM worker holds before it loads weights: the figure that a sleep is compared with.

vLLM calls nothing of ours at that moment, so its `load_model` is wrapped. It is the one method that
both workers, of the CPU and of GPUs, have from the same class.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from engine_plugins.admin.absent_parts import note_absent
from engine_plugins.admin.engine_processes import sign_in
from engine_plugins.admin.runtime_dir import RUNTIME_DIR, first_process
from engine_plugins.admin.server_end import end_with_first_process
from engine_plugins.sleep.gpu_device import rank_memory
from engine_plugins.sleep.rank_memory import RankMemory

__all__ = ["hook_load_model", "memory_of"]

_MEMORY = "_engine_plugins_memory"


def hook_load_model() -> None:
    """Measure every worker of this process that has our extension before it loads."""
    load_model = Worker.load_model
    if hasattr(load_model, _MEMORY):
        return

    @functools.wraps(load_model)
    def measured(self: Any, *args: Any, **kwargs: Any) -> None:
        if hasattr(self, "engine_plugins_call"):
            _take_baseline(self)
            _sign_in(self)
        load_model(self, *args, **kwargs)

    setattr(measured, _MEMORY, True)
    Worker.load_model = measured


def _take_baseline(worker: Any) -> None:
    """A model is loaded without it too: the State tells what is missing."""
    try:
        memory_of(worker).take_baseline()
    except Exception as error:
        note_absent("memory_baseline", error)


def _sign_in(worker: Any) -> None:
    if RUNTIME_DIR in os.environ:
        runtime_dir = Path(os.environ[RUNTIME_DIR])
        sign_in(runtime_dir, "worker", int(worker.rank))
        end_with_first_process(runtime_dir)


def memory_of(worker: Any) -> RankMemory:
    """The measure of a worker; without a baseline where it had loaded before it was asked."""
    memory: RankMemory | None = getattr(worker, _MEMORY, None)
    if memory is None:
        tp_rank = int(worker.rank) % int(worker.vllm_config.parallel_config.tensor_parallel_size)
        memory = rank_memory(tp_rank, worker.device, engine=first_process())
        setattr(worker, _MEMORY, memory)
    return memory
