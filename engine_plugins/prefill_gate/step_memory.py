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
    MemoryFigures,
    device_cap,
    read_host,
    resolve_cap,
)
from engine_plugins.weights.hardware.peak_memory import PeakMemory, return_free_memory

__all__ = ["DeviceStepMemory", "HostStepMemory", "StepMemory", "step_memory"]

LOOK_LASTS_S = 2.0
"""After which figures need another: whoever looks now and then has stood still, or ended."""


class StepMemory(Protocol):
    """Measured in the rank's own process."""

    def look(self) -> None:
        """See how much memory is free beside what the rank holds; takes a while."""
        ...

    def figures(self) -> MemoryFigures:
        """What is in use now, and what may be, as of the last look."""
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
    return DeviceStepMemory(device) if device.type == "cuda" else HostStepMemory(ranks=ranks)


class HostStepMemory:
    """Of a rank on the CPU platform."""

    def __init__(self, *, ranks: int) -> None:
        self._ranks = ranks
        self._peak: PeakMemory | None = None
        self.look()

    def look(self) -> None:
        """At the machine, and at the limits of this process and its cgroup."""
        self._cap = resolve_cap(None, HostFigures.now(), ranks=self._ranks)
        self._looked_at = time.monotonic()

    def figures(self) -> MemoryFigures:
        """Resident bytes, addresses and their limits."""
        if time.monotonic() - self._looked_at > LOOK_LASTS_S:
            self.look()
        return read_host(self._cap)

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
        self.look()


class DeviceStepMemory:
    """Of a rank on a CUDA device; what torch holds in reserve counts as free.

    Args:
        device: of the rank; which one is current may differ from thread to thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = -1
        self._cap_bytes = self._total_bytes = 0
        self._looked_at = -LOOK_LASTS_S

    def look(self) -> None:
        """At what the GPU has free, reading what torch holds twice as on the host."""
        before = torch.cuda.memory_reserved(self._device)
        free, self._total_bytes = torch.cuda.mem_get_info(self._device)
        reserved = min(before, torch.cuda.memory_reserved(self._device))
        cap = device_cap(free=free, ours=reserved)
        self._cap_bytes = cap.resident_bytes
        self._looked_at = time.monotonic()

    def figures(self) -> MemoryFigures:
        """Bytes given out by torch's allocator, and what it could come to give out."""
        if time.monotonic() - self._looked_at > LOOK_LASTS_S:
            self.look()
        return MemoryFigures(
            self._allocated("current"), self._cap_bytes, device_bytes=self._total_bytes
        )

    def start(self) -> None:
        """Reset the allocator's high-water mark."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = self._allocated("current")

    def peak_bytes(self) -> int:
        """From the allocator's high-water mark."""
        return -1 if self._before < 0 else self._allocated("peak") - self._before

    def give_back(self) -> None:
        """Collect Python's garbage and empty torch's cache."""
        gc.collect()
        torch.cuda.empty_cache()
        self.look()

    def _allocated(self, when: str) -> int:
        """Bytes that torch's allocator has given out.

        `torch.cuda.memory_allocated` says the same, and puts all its figures into one dict first.
        """
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        return int(stats["allocated_bytes"]["all"][when])
