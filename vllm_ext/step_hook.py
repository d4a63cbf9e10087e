"""A vLLM worker around its steps: it measures them for the prefill gate, where the gate says so.

Patches of `Worker`, idempotent, since vLLM has no plugin point around a step; remove when it has.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu_worker import Worker

from vllm_ext.step_order import meter_of, order_of
from vllm_ext.versions import VLLM

__all__ = ["hook_steps"]

_HOOKED = "_engine_plugins_measured"


def hook_steps() -> None:
    """Have every worker of this process follow orders."""
    if hasattr(Worker.execute_model, _HOOKED):
        return
    VLLM.check("vllm.v1.worker.gpu_worker")
    execute_model, sample_tokens = Worker.execute_model, Worker.sample_tokens

    @functools.wraps(execute_model)
    def execute(self: Any, scheduler_output: SchedulerOutput) -> Any:
        order, meter = order_of(scheduler_output), meter_of(self)
        if order is None or meter is None:
            return execute_model(self, scheduler_output)
        meter.before(order)
        output = execute_model(self, scheduler_output)
        if output is not None:
            meter.after()
        return output

    @functools.wraps(sample_tokens)
    def sample(self: Any, grammar_output: Any) -> Any:
        output = sample_tokens(self, grammar_output)
        meter = meter_of(self)
        if meter is not None:
            meter.after()
        return output

    setattr(execute, _HOOKED, True)
    Worker.execute_model, Worker.sample_tokens = execute, sample
