"""Whether what is still resident of an engine may be: pure functions over the ranks' rows."""

from __future__ import annotations

from collections.abc import Sequence

from engine_plugins.sleep.memory_report import RankMemoryRow, ResidualPolicy, ResidualReport

__all__ = ["assess"]


def assess(
    rows: Sequence[RankMemoryRow],
    *,
    policy: ResidualPolicy,
    threshold_bytes: int,
    over_baseline_bytes: int,
    measured_at: float,
) -> ResidualReport:
    """Sum within a device, judge each, and let the worst speak for the engine.

    Args:
        rows: one for each rank and device.
        policy: what becomes of a verdict that is not a pass.
        threshold_bytes: what may stay resident of a GPU. It does not apply to host memory.
        over_baseline_bytes: what may stay resident over the baseline, on any device.
        measured_at: Unix seconds.
    """
    raise NotImplementedError
