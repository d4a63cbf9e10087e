"""A server that says what the gate took of each step of its scheduler; see `sglang_launcher`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_ext import prefill_hook, step_hook
from tests.support.gate_clock import GateClock
from tests.support.sglang_launcher import launch

__all__ = ["TIMES"]

TIMES = "GATE_TIMES"
"""Where it is written: nanoseconds of one step on each line."""
_WRITTEN_AT_ONCE = 100

_clock = GateClock(time.thread_time_ns)
_steps: list[int] = []


def _timed(hook: Callable[..., Any]) -> Callable[..., Any]:
    inner = _clock.timed(hook, ours=True)

    def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return inner(_clock.timed(original, ours=False), *args, **kwargs)

    return call


def _ending_a_step(hook: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = hook(*args, **kwargs)
        _steps.append(_clock.nanoseconds)
        _clock.nanoseconds = 0
        if len(_steps) == _WRITTEN_AT_ONCE:
            with Path(os.environ[TIMES]).open("a") as file:
                file.writelines(f"{each}\n" for each in _steps)
            _steps.clear()
        return result

    return call


vars(prefill_hook)["get_new_batch_prefill"] = _timed(prefill_hook.get_new_batch_prefill)
vars(step_hook)["run_batch"] = _ending_a_step(_timed(step_hook.run_batch))

if __name__ == "__main__":
    launch()
