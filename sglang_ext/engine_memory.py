"""What an SGLang scheduler holds in memory, and what can release it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.environ import envs

from engine_plugins.engine_rank import TaggedTensors
from engine_plugins.settings import Settings
from engine_plugins.sleep.hook_mode import resolve_hook_mode
from engine_plugins.sleep.host_memory import HostMemory
from engine_plugins.sleep.memory_backend import MemoryBackend
from engine_plugins.sleep.memory_saver import SaverMemory, pool_bytes

__all__ = ["memory_backend", "tagged_tensors"]


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
    """Pages on the CPU, SGLang's memory saver on a GPU, or None where that is off.

    SGLang's own routes demand that no request is held. Here the same is done to memory with
    requests held: their KV was dropped before. SGLang names its regions as we name tags.
    """
    runner, arguments = scheduler.tp_worker.model_runner, scheduler.server_args
    if runner.device == "cpu":
        return HostMemory(tensors, folder=settings.sleep_dir)
    if not arguments.enable_memory_saver:
        return None
    graphs: TaggedTensors = {"cuda_graph": list}
    return SaverMemory(
        scheduler.memory_saver_adapter,
        {**tensors, **(graphs if envs.SGLANG_MEMORY_SAVER_CUDA_GRAPH.get() else {})},
        sizes=lambda tag: pool_bytes(tensors[tag]()) if tag in tensors else 0,
        mode=resolve_hook_mode(),
        lasting={"weights": runner.model.buffers},
        backed_up=["weights"] if arguments.enable_weights_cpu_backup else [],
    )


def _buffers(pool: Any) -> Iterator[torch.Tensor]:
    """Every tensor that a KV pool, or a pool within it, holds as a buffer."""
    for name, value in vars(pool).items():
        if name.endswith("_pool") and hasattr(value, "__dict__"):
            yield from _buffers(value)
        elif name.endswith("buffer"):
            each = [value] if isinstance(value, torch.Tensor) else value or ()
            yield from (tensor for tensor in each if isinstance(tensor, torch.Tensor))
