"""What an SGLang rank holds before it loads weights: the figure that a sleep is compared with."""

from __future__ import annotations

from typing import Any

import torch.distributed

from engine_plugins.admin.absent_parts import note_absent
from engine_plugins.admin.runtime_dir import first_process
from engine_plugins.sleep.gpu_device import rank_memory
from engine_plugins.sleep.rank_memory import RankMemory

__all__ = ["before_load_model", "memory_of"]

_MEMORY = "engine_plugins_memory"


def before_load_model(runner: Any, *args: Any, **kwargs: Any) -> None:
    """Before `ModelRunner.load_model`: communicators are there, weights are not.

    A model is loaded without it too: the State tells what is missing.
    """
    try:
        memory_of(runner).take_baseline()
    except Exception as error:
        note_absent("memory_baseline", error)


def memory_of(runner: Any) -> RankMemory:
    """The measure of a model runner; without a baseline where it had loaded before it was asked."""
    memory: RankMemory | None = getattr(runner, _MEMORY, None)
    if memory is None:
        tp_rank = torch.distributed.get_rank()
        memory = rank_memory(tp_rank, _device(runner), engine=first_process())
        setattr(runner, _MEMORY, memory)
    return memory


def _device(runner: Any) -> str:
    return str(runner.device) if runner.device == "cpu" else f"{runner.device}:{runner.gpu_id}"
