"""A worker extension and a scheduler whose vLLM server says what the gate took of each step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu_worker import Worker

from tests.support.step_times import clock, ending_a_step
from vllm_ext import step_hook
from vllm_ext.scheduler_hook import GatedScheduler
from vllm_ext.worker_extension import EnginePluginsWorkerExtension

__all__ = ["TimedExtension", "TimedScheduler"]

_OURS = {
    "is_ready": "_is_ready",
    "look_up": "_look_up",
    "size": "_size",
    "schedule": "_schedule",
    "update_from_output": "_update",
    "free_request": "_free",
}
"""Our methods around the scheduler, and vLLM's that they call."""
_kept: deque[Any] = deque(maxlen=2)
_STEP = ("execute_model", "sample_tokens")
_take_over = GatedScheduler._take_over


class TimedScheduler(Scheduler):
    """As it is: the core imports this module for it."""


class TimedExtension(EnginePluginsWorkerExtension):
    """As it is: the rank's process imports this module for it."""


def _take_over_timed(gated: Any) -> None:
    for ours in _OURS:
        setattr(gated, ours, clock.timed(getattr(gated, ours), ours=True))
    gated.update_from_output = ending_a_step(gated.update_from_output, "scheduler")
    _take_over(gated)
    for theirs in _OURS.values():
        setattr(gated, theirs, clock.timed(getattr(gated, theirs), ours=False))


def _time_worker() -> None:
    """Undo our hooks, and put them between the clock and vLLM's methods, themselves timed."""
    for name in _STEP:
        setattr(Worker, name, clock.timed(getattr(Worker, name).__wrapped__, ours=False))
    step_hook.hook_steps()
    for name in _STEP:
        setattr(Worker, name, clock.timed(getattr(Worker, name), ours=True))
    Worker.sample_tokens = ending_a_step(Worker.sample_tokens, "rank")
    Worker.execute_model = _keeping_its_step(Worker.execute_model)


def _keeping_its_step(execute_model: Callable[..., Any]) -> Callable[..., Any]:
    """VLLM's memory of a step is not freed while the clock runs, just because we had it last."""

    def call(worker: Any, step: Any) -> Any:
        _kept.append(step)
        return execute_model(worker, step)

    return call


for _name, _timed in {"_take_over": _take_over_timed}.items():
    setattr(GatedScheduler, _name, _timed)
if hasattr(Worker.execute_model, "__wrapped__"):
    _time_worker()
