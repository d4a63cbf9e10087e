"""What is in use, seen over several steps: one reading may fall between two chunks."""

from __future__ import annotations

from engine_plugins.prefill_gate.memory_cap import Reading

__all__ = ["HighWater"]

WINDOW = 32
"""Readings after which a peak begins to be forgotten; after twice as many it is."""


class HighWater:
    """The highest of the recent readings while anything is in flight, the latest when nothing is.

    Nothing latches: a peak is forgotten with its window, and at once by an idle engine.
    """

    def __init__(self) -> None:
        self.idle: Reading | None = None
        """The latest reading of an idle engine, or the first of all."""
        self._latest: Reading | None = None
        self._before: Reading | None = None
        self._count = 0

    def read(self, reading: Reading, *, in_flight: bool) -> Reading:
        """Take a reading, made between two steps, and give the one to go by."""
        if not in_flight or self.idle is None:
            self.idle = reading
        if not in_flight:
            self._latest = self._before = None
            self._count = 0
            return reading
        self._count += 1
        if self._count > WINDOW:
            self._before, self._latest, self._count = self._latest, None, 1
        self._latest = _tighter(self._latest, reading)
        return _tighter(self._before, self._latest)

    def recap(self, cap_bytes: int | None) -> None:
        """A cap was configured; `None` for one that the next reading tells."""
        self.forget()
        if self.idle is not None:
            self.idle = None if cap_bytes is None else self.idle._replace(cap_bytes=cap_bytes)

    def forget(self) -> None:
        """Memory was given back: what was read before does not hold any more."""
        self._latest = self._before = None


def _tighter(one: Reading | None, other: Reading) -> Reading:
    if one is None or other.headroom_bytes < one.headroom_bytes:
        return other
    return one
