"""An SGLang server that says what the gate took of each step; see `sglang_launcher`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_ext import prefill_hook, step_hook
from tests.support.sglang_launcher import launch
from tests.support.step_times import clock, ending_a_step


def _timed(hook: Callable[..., Any]) -> Callable[..., Any]:
    inner = clock.timed(hook, ours=True)

    def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return inner(clock.timed(original, ours=False), *args, **kwargs)

    return call


vars(prefill_hook)["get_new_batch_prefill"] = _timed(prefill_hook.get_new_batch_prefill)
vars(step_hook)["run_batch"] = ending_a_step(_timed(step_hook.run_batch), "scheduler")

if __name__ == "__main__":
    launch()
