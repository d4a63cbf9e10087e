"""What a vLLM worker holds in memory, and what can release it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from engine_plugins.engine_rank import TaggedTensors
from engine_plugins.settings import Settings
from engine_plugins.sleep.host_memory import HostMemory
from engine_plugins.sleep.memory_backend import MemoryBackend, MemoryTag

__all__ = ["VllmSleepMode", "memory_backend", "tagged_tensors"]

logger = logging.getLogger(__name__)


def tagged_tensors(worker: Any) -> TaggedTensors:
    """The worker's parameters, those of a model that drafts among them, and its KV cache."""
    runner = worker.model_runner
    return {
        "weights": lambda: (each for model in _models(worker) for each in model.parameters()),
        "kv_cache": lambda: _tensors(runner.kv_caches),
    }


def memory_backend(worker: Any, tensors: TaggedTensors, settings: Settings) -> MemoryBackend | None:
    """Pages on the CPU, vLLM's sleep mode on a GPU, or None where that is off."""
    config = worker.vllm_config
    if next(worker.model_runner.get_model().parameters()).device.type == "cpu":
        return HostMemory(
            tensors,
            kept={"weights": lambda: _packed(_models(worker))},
            folder=settings.sleep_dir,
        )
    return VllmSleepMode(worker) if config.model_config.enable_sleep_mode else None


class VllmSleepMode:
    """The `MemoryBackend` of vLLM's own sleep mode, which releases all at once.

    Args:
        worker: of a GPU.
    """

    together = True
    tags: frozenset[MemoryTag] = frozenset({"weights", "kv_cache"})

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._discarded = False

    def release(self, tag: MemoryTag, *, keep: bool) -> None:
        """With the weights, which come last, everything is released."""
        if tag != "weights":
            return
        self._discarded = not keep
        try:
            self._worker.sleep(level=1 if keep else 2)
        except AssertionError as error:
            # vLLM measures the whole GPU, and another process took more than was given back.
            logger.warning("vLLM says of its sleep: %s; what we measure decides", error)

    def restore(self, tag: MemoryTag) -> None:
        """Map the memory again, weights with what vLLM saved of them.

        Adapters lie in the weights' memory as well. Where that was discarded vLLM forgets which
        are there, and loads each anew for the next request that asks for it.
        """
        self._worker.wake_up([tag])
        if tag == "weights" and self._discarded:
            self._worker.model_runner.reset_lora_state()

    def unreleased(self, tag: MemoryTag) -> dict[str, int]:
        """VLLM does not say."""
        return {}


def _models(worker: Any) -> list[nn.Module]:
    draft = worker.get_draft_model()
    return [worker.model_runner.get_model(), *([] if draft is None else [draft])]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in lists of lists: some layers have several caches."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Iterable):
        for each in value:
            yield from _tensors(each)


def _packed(models: Iterable[nn.Module]) -> dict[str, int]:
    """Bytes of the layers that only live on in the packed form of the CPU's kernels."""
    nbytes = 0
    for module in (each for model in models for each in model.modules()):
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and not weight.numel():
            nbytes += _elements(module) * weight.element_size()
    return {"packed by the CPU's kernels": nbytes} if nbytes else {}


def _elements(layer: Any) -> int:
    """Elements of a linear layer's or an embedding's weight, on this rank."""
    rows = getattr(layer, "output_size_per_partition", None)
    if rows is not None:
        return int(rows * layer.input_size_per_partition)
    return int(getattr(layer, "num_embeddings_per_partition", 0) * layer.embedding_dim)
