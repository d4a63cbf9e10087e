"""Rows of ranks as workers report them, made by hand."""

from __future__ import annotations

from typing import Any

from engine_plugins.sleep.memory_ladder import sample_of
from engine_plugins.sleep.memory_report import (
    Baseline,
    GpuDevice,
    MemorySample,
    MemorySource,
    RankMemoryRow,
    Rung,
)
from engine_plugins.sleep.process_identity import identify

__all__ = ["GIB", "exact", "row", "unknown"]

GIB = 1 << 30


def exact(gib: float, source: MemorySource = "nvml", group: str = "") -> MemorySample:
    nbytes = int(gib * GIB)
    rung = Rung(source=source, resident_bytes=nbytes, quality="exact", group=group)
    return sample_of([rung])


def unknown(*, at_least: float | None = None, whole_gpu: float | None = None) -> MemorySample:
    """A driver that says 0 for the rank's processes, and what else there may be to go by."""
    rungs = [Rung(source="nvml", reason="zero_bytes", detail="0 bytes for [7]")]
    if at_least is not None:
        held = int(at_least * GIB)
        rungs.append(Rung(source="allocator", resident_bytes=held, quality="lower_bound"))
    if whole_gpu is not None:
        held = int(whole_gpu * GIB)
        rungs.append(
            Rung(source="whole_gpu", resident_bytes=held, quality="upper_bound", group="gpu")
        )
    return sample_of(rungs)


def row(
    sample: MemorySample,
    *,
    tp_rank: int = 0,
    gpu: str | None = "GPU-a",
    baseline: float | None = None,
    taken: Baseline | None = None,
    **others: Any,
) -> RankMemoryRow:
    """`baseline` is GiB as the sample was measured; `taken` one that was taken otherwise."""
    if baseline is not None:
        held = int(baseline * GIB)
        taken = Baseline(resident_bytes=held, source=sample.source or "nvml", quality="exact")
    return RankMemoryRow(
        tp_rank=tp_rank,
        process=identify(),
        device=None if gpu is None else GpuDevice(uuid=gpu),
        sample=sample,
        baseline=taken,
        **others,
    )
