"""What a pull costs its process: seconds that pass, and seconds of CPU."""

from __future__ import annotations

import time
from typing import NamedTuple

__all__ = ["Clock", "Cost"]


class Cost(NamedTuple):
    """Of one pull. `cpu_s` is of all the process's threads; other processes do not add to it."""

    seconds: float
    cpu_s: float


class Clock:
    """Started when it is made."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def cost(self) -> Cost:
        """What has passed since."""
        seconds, cpu_s = self._began
        return Cost(time.perf_counter() - seconds, time.process_time() - cpu_s)
