"""The slopes as a table, and which of them are too steep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tests.soak.runs import Run
from tests.soak.slopes import growth

__all__ = ["MEMORY_LIMIT", "WARM_UP", "Slope", "slopes", "table"]

WARM_UP = 50
"""Steps that are left out: caches and pools fill."""
MEMORY_LIMIT = 8 << 10
"""Bytes that a process may grow by per step, beyond what it does without."""
COUNT_LIMIT = 0.5 / WARM_UP
"""A count that grows at all grows by more than this: by one in the steps that are judged."""


@dataclass(frozen=True, kw_only=True)
class Slope:
    """How something grows per step.

    Attributes:
        what: `memory`, `descriptors`, `threads` or `files`.
        of: a process, or a place.
        beside: per step with updates or sleeps.
        alone: per step of the control; None where it has no such process.
    """

    what: str
    of: str
    beside: float
    alone: float | None

    @property
    def holds(self) -> bool:
        """Whether it is no steeper than it may be."""
        more = self.beside - max(self.alone or 0, 0)
        return more < (MEMORY_LIMIT if self.what == "memory" else COUNT_LIMIT)


def slopes(run: Run, control: Run) -> list[Slope]:
    """All slopes of a run, beside those of the control."""
    found = []
    for what in ("memory", "descriptors", "threads", "files"):
        for of in getattr(run.held[0], what):
            samples = [getattr(held, what)[of] for held in run.held[_warm(run) :]]
            other = [getattr(held, what).get(of) for held in control.held[_warm(control) :]]
            alone = None if None in other else growth(other)
            found.append(Slope(what=what, of=of, beside=growth(samples), alone=alone))
    return found


def table(found: Iterable[tuple[str, Slope]]) -> str:
    """Slopes of named runs in Markdown."""
    head = "| engine and run | what | of | per step | alone | holds |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(_line(name, slope) for name, slope in found)])


def _line(name: str, slope: Slope) -> str:
    holds = "yes" if slope.holds else "**no**"
    cells = (
        name,
        slope.what,
        slope.of,
        _told(slope.what, slope.beside),
        _told(slope.what, slope.alone),
    )
    return "| " + " | ".join([*cells, holds]) + " |"


def _told(what: str, slope: float | None) -> str:
    if slope is None:
        return "-"
    return f"{slope / 1024:.2f} KiB" if what == "memory" else f"{slope:.3f}"


def _warm(run: Run) -> int:
    """Half of a run that is too short for a whole warm-up."""
    return min(WARM_UP, len(run.held) // 2)
