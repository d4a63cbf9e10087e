"""What the gate took of each step, written down by every process of a server that has steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.gate_clock import GateClock

__all__ = ["TIMES", "clock", "ending_a_step"]

TIMES = "GATE_TIMES"
"""A folder: nanoseconds of one step on each line of a file for each part of an engine."""
_WRITTEN_AT_ONCE = 100

clock = GateClock(time.thread_time_ns)
_steps: list[int] = []


def ending_a_step(method: Callable[..., Any], part: str) -> Callable[..., Any]:
    """The method; what the clock has counted at its end is one step's, of a part of an engine."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        _steps.append(clock.nanoseconds)
        clock.nanoseconds = 0
        if len(_steps) == _WRITTEN_AT_ONCE:
            with Path(os.environ[TIMES], part).open("a") as file:
                file.writelines(f"{each}\n" for each in _steps)
            _steps.clear()
        return result

    return call
