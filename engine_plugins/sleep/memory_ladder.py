"""From what several sources said to one sample: the first exact one, or bounds from the others."""

from __future__ import annotations

from collections.abc import Sequence

from engine_plugins.sleep.memory_report import MemorySample, Rung

__all__ = ["sample_of"]


def sample_of(rungs: Sequence[Rung], *, probe_s: float = 0.0) -> MemorySample:
    """The best that the rungs, best source first, say together.

    A lower bound is the figure before an upper one, since it is of the rank alone. The reason is
    that of the first source that was there and could not say.
    """
    asked = list(rungs)
    for rung in asked:
        if rung.quality == "exact" and rung.resident_bytes is not None:
            return MemorySample(
                resident_bytes=rung.resident_bytes,
                source=rung.source,
                quality="exact",
                at_least_bytes=rung.resident_bytes,
                at_most_bytes=rung.resident_bytes,
                group=rung.group,
                probe_s=probe_s,
                rungs=asked,
            )
    lower = max(_of(asked, "lower_bound"), key=_figure, default=None)
    upper = min(_of(asked, "upper_bound"), key=_figure, default=None)
    figure = lower or upper
    why = next((rung for rung in asked if rung.reason not in ("", "no_dmem")), None)
    return MemorySample(
        resident_bytes=None if figure is None else figure.resident_bytes,
        source=None if figure is None else figure.source,
        quality="unknown" if figure is None else figure.quality,
        reason="no_source" if why is None else why.reason,
        detail="" if why is None else why.detail,
        at_least_bytes=_figure(lower) if lower else 0,
        at_most_bytes=_figure(upper) if upper else None,
        group=upper.group if upper else "",
        probe_s=probe_s,
        rungs=asked,
    )


def _of(rungs: Sequence[Rung], quality: str) -> list[Rung]:
    return [each for each in rungs if each.quality == quality and each.resident_bytes is not None]


def _figure(rung: Rung) -> int:
    return rung.resident_bytes or 0
