"""The memory of one engine rank, measured in its own process: samples, settling, baseline."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from engine_plugins.sleep.memory_report import (
    Baseline,
    GpuDevice,
    MemorySample,
    RankMemoryRow,
    Rung,
    Settled,
)
from engine_plugins.sleep.process_identity import identify
from engine_plugins.sleep.process_memory import process_memory
from engine_plugins.sleep.settling import DEADLINE_S, settled

__all__ = ["RankMemory"]


class RankMemory:
    """Measures one rank. On the CPU platform the figure is this process's own resident memory.

    Args:
        tp_rank: of the rank.
        device: its GPU; `None` on the CPU platform.
        allocator_bytes: what the rank's allocator knows to hold on the GPU, a lower bound.
        whole_gpu_bytes: what everybody holds on the GPU, an upper bound.
    """

    def __init__(
        self,
        tp_rank: int,
        device: GpuDevice | None,
        *,
        allocator_bytes: Callable[[], int] | None = None,
        whole_gpu_bytes: Callable[[], int] | None = None,
    ) -> None:
        self.tp_rank = tp_rank
        self.device = device
        self.process = identify()
        self._allocator_bytes = allocator_bytes
        self._whole_gpu_bytes = whole_gpu_bytes
        self._baseline: Baseline | None = None

    def take_baseline(self) -> Baseline | None:
        """Remember what is resident now: call it before weights, with context and communicators.

        `None` if that is not known; nothing is then compared with it.
        """
        now = self.sample()
        if now.resident_bytes is not None and now.source is not None:
            self._baseline = Baseline(
                resident_bytes=now.resident_bytes, source=now.source, quality=now.quality
            )
        return self._baseline

    def sample(self) -> MemorySample:
        """Probe once. Never raises: what goes wrong is the sample's reason."""
        began = time.perf_counter()
        rungs = self._rungs()
        return _sample(rungs, time.perf_counter() - began)

    def settled(self, *, deadline_s: float = DEADLINE_S) -> Settled:
        """Probe until memory stands still."""
        return settled(self.sample, deadline_s=deadline_s)

    def row(
        self,
        measured: Settled | MemorySample,
        *,
        kept_bytes: int = 0,
        components: Mapping[str, int] | None = None,
        engine_accounting: Mapping[str, int] | None = None,
    ) -> RankMemoryRow:
        """What the rank reports: see `RankMemoryRow`."""
        if isinstance(measured, MemorySample):
            measured = Settled(sample=measured, settled=True, seconds=0.0, samples=1)
        return RankMemoryRow(
            tp_rank=self.tp_rank,
            process=self.process,
            device=self.device,
            sample=measured.sample,
            settle_s=measured.seconds,
            settled=measured.settled,
            baseline=self._baseline,
            kept_bytes=kept_bytes,
            components=dict(components or {}),
            engine_accounting=dict(engine_accounting or {}),
        )

    def _rungs(self) -> list[Rung]:
        if self.device is None:
            return [process_memory()]
        raise NotImplementedError


def _sample(rungs: list[Rung], probe_s: float) -> MemorySample:
    raise NotImplementedError
