"""Whether what is still resident of an engine may be: pure functions over the ranks' rows.

Every figure is an interval, from what is surely held to what can be held at most. A verdict is
passed where the whole interval lies on one side of the threshold; otherwise it is unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from engine_plugins.sleep.memory_report import (
    Baseline,
    DeviceResidual,
    MemorySample,
    Quality,
    RankMemoryRow,
    Reason,
    ResidualPolicy,
    ResidualReport,
    Verdict,
)

__all__ = ["assess", "device_of"]

_WORST_FIRST: tuple[Verdict, ...] = ("fail", "unknown", "pass")


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
        policy: `enforce` refuses all but a pass; `guard` judges an unknown by its upper bound and
            lets it pass only where there is none; `observe` logs and refuses nothing.
        threshold_bytes: what may stay resident of a GPU. It does not apply to host memory, of
            which a worker holds a share that has nothing to do with sleep.
        over_baseline_bytes: what may stay resident over the baseline, on any device.
        measured_at: Unix seconds.
    """
    by_device: dict[str, list[RankMemoryRow]] = {}
    for row in rows:
        by_device.setdefault(device_of(row), []).append(row)
    limits = _Limits(threshold_bytes, over_baseline_bytes, policy)
    devices = [_judge(device, of_it, limits) for device, of_it in by_device.items()]
    worst = min(devices, key=_badness, default=None)
    verdict: Verdict = worst.verdict if worst else "unknown"
    refused = verdict == "fail" or (policy == "enforce" and verdict == "unknown")
    return ResidualReport(
        verdict=verdict,
        reason=worst.reason if worst else "no_rows",
        detail=worst.detail if worst else "no rank has reported its memory",
        policy=policy,
        refused=refused and policy != "observe",
        threshold_bytes=threshold_bytes,
        over_baseline_bytes=over_baseline_bytes,
        worst_device=worst.device if worst else None,
        devices=devices,
        rows=list(rows),
        measured_at=measured_at,
    )


class _Limits(NamedTuple):
    threshold: int
    over_baseline: int
    policy: ResidualPolicy


class _Interval(NamedTuple):
    low: int
    high: int | None

    def less(self, nbytes: int) -> _Interval:
        return _Interval(self.low - nbytes, None if self.high is None else self.high - nbytes)

    def against(self, limit: int) -> Verdict:
        if self.low > limit:
            return "fail"
        return "pass" if self.high is not None and self.high <= limit else "unknown"


def _judge(device: str, rows: list[RankMemoryRow], limits: _Limits) -> DeviceResidual:
    samples = [row.sample for row in rows]
    held = _Interval(_at_least(samples), _at_most(samples))
    exact = all(each.quality == "exact" for each in samples)
    resident = held.low or held.high
    quality: Quality = "lower_bound" if held.low else "upper_bound"
    kept = sum(row.kept_bytes for row in rows)
    baseline = _baseline(rows)
    finding = _find(device, rows, held.less(kept), baseline, limits)
    return DeviceResidual(
        device=device,
        tp_ranks=[row.tp_rank for row in rows],
        resident_bytes=resident,
        at_least_bytes=held.low,
        at_most_bytes=held.high,
        quality="unknown" if resident is None else "exact" if exact else quality,
        sources=sorted({each.source for each in samples if each.source is not None}),
        baseline_bytes=baseline,
        residual_bytes=(
            None if resident is None or baseline is None else resident - baseline - kept
        ),
        kept_bytes=kept,
        verdict=finding.verdict,
        reason=finding.reason,
        detail=finding.detail,
    )


class _Finding(NamedTuple):
    verdict: Verdict
    reason: Reason = ""
    detail: str = ""


def _find(
    device: str, rows: list[RankMemoryRow], held: _Interval, baseline: int | None, limits: _Limits
) -> _Finding:
    known = _why_unsettled(rows) or _compare(device, rows, held, baseline, limits)
    if known.verdict == "unknown" and limits.policy == "guard" and held.high is not None:
        bound = _Interval(held.high, held.high)
        judged = _compare(device, rows, bound, baseline, limits)
        if judged.verdict != "unknown":
            detail = f"{known.detail}; judged by the upper bound. {judged.detail}".rstrip()
            return _Finding(judged.verdict, known.reason, detail)
    return known


def _why_unsettled(rows: list[RankMemoryRow]) -> _Finding | None:
    moving = [row.tp_rank for row in rows if not row.settled]
    if not moving:
        return None
    detail = f"the memory of ranks {moving} still moved after {max(r.settle_s for r in rows):.1f} s"
    return _Finding("unknown", "not_settled", detail)


def _compare(
    device: str, rows: list[RankMemoryRow], held: _Interval, baseline: int | None, limits: _Limits
) -> _Finding:
    where = f"{device} (ranks {', '.join(str(row.tp_rank) for row in rows)})"
    on_gpu = rows[0].device is not None
    found = []
    if on_gpu:
        verdict = held.against(limits.threshold)
        text = f"{_gib(held.low)} resident on {where}; {_gib(limits.threshold)} may be"
        found.append(_Finding(verdict, "over_threshold", text))
    if baseline is not None:
        over = held.less(baseline)
        text = f"{_gib(over.low)} over the baseline on {where}; {_gib(limits.over_baseline)} may be"
        found.append(_Finding(over.against(limits.over_baseline), "over_baseline", text))
    elif not on_gpu:
        reason, text = _why_no_baseline(rows)
        found.append(_Finding("unknown", reason, f"{text} of {where}"))
    worst = min(found, key=lambda each: _WORST_FIRST.index(each.verdict))
    if worst.verdict == "pass":
        return _Finding("pass")
    if worst.verdict == "fail":
        return worst
    inexact = next((row.sample for row in rows if row.sample.quality != "exact"), None)
    if inexact is None:
        return worst
    return _Finding("unknown", inexact.reason, f"{where}: {inexact.detail}")


def _at_least(samples: Iterable[MemorySample]) -> int:
    """Of figures that are of a group the largest, of ranks' own the sum."""
    figures = [
        (each.group if each.quality == "exact" else "", each.at_least_bytes) for each in samples
    ]
    return _sum(figures)


def _at_most(samples: Sequence[MemorySample]) -> int | None:
    """What all ranks hold at most; no more than everybody on the GPU."""
    bounds = [
        rung.resident_bytes
        for each in samples
        for rung in each.rungs
        if rung.source == "whole_gpu" and rung.resident_bytes is not None
    ]
    figures = [
        (each.group, each.at_most_bytes) for each in samples if each.at_most_bytes is not None
    ]
    if len(figures) == len(samples):
        bounds.append(_sum(figures))
    return min(bounds, default=None)


def _baseline(rows: list[RankMemoryRow]) -> int | None:
    figures = []
    for row in rows:
        if row.baseline is None or not _comparable(row.baseline, row.sample):
            return None
        group = row.sample.group if row.sample.quality == "exact" else ""
        figures.append((group, row.baseline.resident_bytes))
    return _sum(figures)


def _comparable(baseline: Baseline, sample: MemorySample) -> bool:
    """Bounds compare with any exact figure, an exact figure with one of the same source."""
    same = sample.quality != "exact" or baseline.source == sample.source
    return baseline.quality == "exact" and same


def _why_no_baseline(rows: list[RankMemoryRow]) -> tuple[Reason, str]:
    if any(row.baseline is None for row in rows):
        return "no_baseline", "there is no baseline"
    return "baseline_not_comparable", "the baseline was measured in another way"


def _sum(figures: Iterable[tuple[str, int]]) -> int:
    own = 0
    groups: dict[str, int] = {}
    for group, nbytes in figures:
        if group:
            groups[group] = max(groups.get(group, 0), nbytes)
        else:
            own += nbytes
    return own + sum(groups.values())


def device_of(row: RankMemoryRow) -> str:
    """The device that a row counts towards; host memory is each worker's own."""
    return row.device.uuid if row.device is not None else f"cpu:{row.tp_rank}"


def _badness(device: DeviceResidual) -> tuple[int, int]:
    return _WORST_FIRST.index(device.verdict), -(device.resident_bytes or 0)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB"
