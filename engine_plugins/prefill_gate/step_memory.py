"""The memory of one engine rank around its steps: what it holds, and what a step took at its peak.

On the host a rank's memory is what is resident of its process; on a GPU it is what torch's
allocator has given out there.
"""

from __future__ import annotations

import gc
import time
from typing import Protocol

import torch

from engine_plugins.prefill_gate.memory_cap import (
    HostFigures,
    MemoryCap,
    MemoryFigures,
    read_host,
    resolve_cap,
    resolve_device_cap,
)
from engine_plugins.weights.peak_memory import PeakMemory, return_free_memory

__all__ = ["DeviceStepMemory", "HostStepMemory", "StepMemory", "step_memory"]

CAP_LASTS_S = 1.0
"""After which it is looked again how much memory is free."""


class StepMemory(Protocol):
    """Measured in the rank's own process."""

    def figures(self) -> MemoryFigures:
        """What is in use now."""
        ...

    def start(self) -> None:
        """Begin to measure a peak."""
        ...

    def peak_bytes(self) -> int:
        """The highest use since `start` over the use then; -1 where nobody can say."""
        ...

    def give_back(self) -> None:
        """Return what is free within the process."""
        ...


def step_memory(device: torch.device, *, ranks: int) -> StepMemory:
    """The memory of a rank that computes on a device.

    Args:
        device: of the rank.
        ranks: that take from the same free memory.
    """
    return DeviceStepMemory() if device.type == "cuda" else HostStepMemory(ranks=ranks)


class HostStepMemory:
    """Of a rank on the CPU platform."""

    def __init__(self, *, ranks: int) -> None:
        self._ranks = ranks
        self._resolved_at = 0.0
        self._cap: MemoryCap | None = None
        self._peak: PeakMemory | None = None

    def figures(self) -> MemoryFigures:
        """Resident bytes, addresses and their limits."""
        return read_host(self._newest_cap())

    def start(self) -> None:
        """Reset the kernel's high-water mark."""
        self._peak = PeakMemory.start(already_held=0)

    def peak_bytes(self) -> int:
        """From the kernel's high-water mark."""
        return -1 if self._peak is None else self._peak.peak_extra_bytes()

    def give_back(self) -> None:
        """Collect Python's garbage and trim the C library's heap."""
        gc.collect()
        return_free_memory()
        self._cap = None

    def _newest_cap(self) -> MemoryCap:
        now = time.monotonic()
        if self._cap is None or now - self._resolved_at >= CAP_LASTS_S:
            self._cap = resolve_cap(None, HostFigures.now(), ranks=self._ranks)
            self._resolved_at = now
        return self._cap


class DeviceStepMemory:
    """Of a rank on a CUDA device; what torch holds in reserve counts as free."""

    def __init__(self) -> None:
        self._before = -1

    def figures(self) -> MemoryFigures:
        """Bytes given out by torch's allocator, and what it could come to give out."""
        free, total = torch.cuda.mem_get_info()
        allocated = torch.cuda.memory_allocated()
        reserve = torch.cuda.memory_reserved() - allocated
        cap = resolve_device_cap(None, total=total, free=free + reserve, ours=allocated)
        return MemoryFigures(allocated, cap.resident_bytes, device_bytes=total)

    def start(self) -> None:
        """Reset the allocator's high-water mark."""
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def peak_bytes(self) -> int:
        """From the allocator's high-water mark."""
        return -1 if self._before < 0 else torch.cuda.max_memory_allocated() - self._before

    def give_back(self) -> None:
        """Collect Python's garbage and empty torch's cache."""
        gc.collect()
        torch.cuda.empty_cache()
