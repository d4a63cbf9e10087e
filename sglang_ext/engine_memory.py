"""What an SGLang scheduler holds in memory, and what can release it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.constants import (
    GPU_MEMORY_TYPE_CUDA_GRAPH,
    GPU_MEMORY_TYPE_KV_CACHE,
    GPU_MEMORY_TYPE_WEIGHTS,
)
from sglang.srt.managers.scheduler_components import weight_updater

from engine_plugins.engine_rank import TaggedTensors
from engine_plugins.errors import SleepRefusedError
from engine_plugins.settings import Settings
from engine_plugins.sleep.host_memory import HostMemory
from engine_plugins.sleep.memory_backend import MemoryBackend, MemoryTag

__all__ = ["SglangMemorySaver", "memory_backend", "tagged_tensors"]

_TAGS: dict[MemoryTag, str] = {
    "weights": GPU_MEMORY_TYPE_WEIGHTS,
    "kv_cache": GPU_MEMORY_TYPE_KV_CACHE,
    "cuda_graph": GPU_MEMORY_TYPE_CUDA_GRAPH,
}


def tagged_tensors(scheduler: Any) -> TaggedTensors:
    """The parameters and the KV cache of the scheduler's model."""
    runner = scheduler.tp_worker.model_runner
    return {
        "weights": lambda: runner.model.parameters(),
        "kv_cache": lambda: _buffers(runner.token_to_kv_pool),
    }


def memory_backend(
    scheduler: Any, tensors: TaggedTensors, settings: Settings
) -> MemoryBackend | None:
    """Pages on the CPU, SGLang's memory saver on a GPU, or None where that is off."""
    if scheduler.tp_worker.model_runner.device == "cpu":
        return HostMemory(tensors, folder=settings.sleep_dir)
    enabled = scheduler.server_args.enable_memory_saver
    return SglangMemorySaver(scheduler) if enabled else None


class SglangMemorySaver:
    """The `MemoryBackend` of SGLang's memory saver.

    SGLang's own routes demand that no request is held. Ours do what those do to memory, with
    requests held: their KV was dropped before.

    Args:
        scheduler: of a GPU, with the memory saver on.
    """

    together = False
    tags: frozenset[MemoryTag] = frozenset(_TAGS)

    def __init__(self, scheduler: Any) -> None:
        self._saver = scheduler.memory_saver_adapter
        self._model = scheduler.tp_worker.model_runner.model
        self._backed_up = bool(scheduler.server_args.enable_weights_cpu_backup)
        self._static: Any = None

    def release(self, tag: MemoryTag, *, keep: bool) -> None:
        """Pause the saver's region.

        Raises:
            SleepRefusedError: weights are to come back, and SGLang keeps no copy of them.
        """
        if keep and not self._backed_up:
            raise SleepRefusedError(
                "SGLang was started without a copy of its weights in host memory, so they would "
                "not come back at wake",
                remedy="start it with --enable-weights-cpu-backup, or sleep with level 2",
            )
        torch.get_device_module().synchronize()
        if tag == "weights":
            self._static = weight_updater._export_static_state(self._model)
        self._saver.pause(_TAGS[tag])

    def restore(self, tag: MemoryTag) -> None:
        """Resume the saver's region."""
        self._saver.resume(_TAGS[tag])
        if tag == "weights":
            weight_updater._import_static_state(self._model, self._static)
            self._static = None

    def unreleased(self, tag: MemoryTag) -> dict[str, int]:
        """The saver does not say."""
        return {}


def _buffers(pool: Any) -> Iterator[torch.Tensor]:
    """Every tensor that a KV pool, or a pool within it, holds as a buffer."""
    for name, value in vars(pool).items():
        if name.endswith("_pool") and hasattr(value, "__dict__"):
            yield from _buffers(value)
        elif name.endswith("buffer"):
            each = [value] if isinstance(value, torch.Tensor) else value or ()
            yield from (tensor for tensor in each if isinstance(tensor, torch.Tensor))
