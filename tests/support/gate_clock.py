"""The time that the gate's hooks take, without what they call of the engine."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

__all__ = ["GateClock"]


class GateClock:
    """Adds up the time within our methods, without that of the engine's within them, nor its own.

    Args:
        now: nanoseconds; of the thread's processor time, since others may be given the core.

    Attributes:
        nanoseconds: so far.
    """

    def __init__(self, now: Callable[[], int]) -> None:
        self.nanoseconds = 0
        self._now = now
        self._ours, self._since = False, 0
        self._own = 0
        self._own = self._median_of_nothing()

    def timed(self, method: Callable[..., Any], *, ours: bool) -> Callable[..., Any]:
        """The method, with the clock running or standing while it is in it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before = self._turn(ours)
            try:
                return method(*args, **kwargs)
            finally:
                self._turn(before)

        return call

    def _turn(self, ours: bool) -> bool:
        now, before = self._now(), self._ours
        if before:
            self.nanoseconds += now - self._since - self._own
        self._ours, self._since = ours, now
        return before

    def _median_of_nothing(self) -> int:
        """Nanoseconds that are counted for a method of ours that does nothing."""
        nothing, counted = self.timed(lambda: None, ours=True), []
        for _ in range(1000):
            before = self.nanoseconds
            nothing()
            counted.append(self.nanoseconds - before)
        self.nanoseconds = 0
        return round(statistics.median(counted))
