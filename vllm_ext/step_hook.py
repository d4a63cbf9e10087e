"""A vLLM worker around its steps: measured for the prefill gate, and a step may be lost alone.

Patches of `Worker`, idempotent, since vLLM has no plugin point around a step; remove when it has.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any, cast

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu_worker import Worker

from engine_plugins.admin.runtime_dir import RUNTIME_DIR
from engine_plugins.prefill_gate.rank_meter import RankMeter, rank_page
from engine_plugins.prefill_gate.step_memory import step_memory
from vllm_ext.lost_step import can_be_taken_back, is_out_of_memory, lose
from vllm_ext.step_order import METER, ORDER, Order, order_of

__all__ = ["hook_steps", "own_meter", "paged_meter"]

_HOOKED = "_engine_plugins_measured"
_LOST = object()
"""In place of the output of a step that is taken back."""

logger = logging.getLogger(__name__)


def hook_steps() -> None:
    """Have every worker of this process follow orders; done where a gate asks for a meter."""
    if hasattr(Worker.execute_model, _HOOKED):
        return
    execute_model, sample_tokens = Worker.execute_model, Worker.sample_tokens

    # Between two steps a call takes a microsecond, so these two call no more than they must.
    @functools.wraps(execute_model)
    def execute(self: Any, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        order: Order | tuple[()] | None = getattr(scheduler_output, ORDER, None)
        meter: RankMeter | None = getattr(self, METER, None)
        if order is None or meter is None:
            return execute_model(self, scheduler_output, *args, **kwargs)
        if order:
            meter.before(order.step)
        meter.step = scheduler_output
        try:
            output = execute_model(self, scheduler_output, *args, **kwargs)
        except Exception as error:
            if not _may_be_lost(self, meter, error):
                raise
            output = _LOST
        if output is _LOST:
            output = _lose(self, meter)
        if output is not None:
            meter.step = None
            if meter.is_due:
                meter.after()
        return output

    @functools.wraps(sample_tokens)
    def sample(self: Any, grammar_output: Any, *args: Any, **kwargs: Any) -> Any:
        meter: RankMeter | None = getattr(self, METER, None)
        if meter is None or meter.step is None:
            return sample_tokens(self, grammar_output, *args, **kwargs)
        try:
            output = sample_tokens(self, grammar_output, *args, **kwargs)
        except Exception as error:
            if not _may_be_lost(self, meter, error):
                raise
            output = _LOST
        if output is _LOST:
            output = _lose(self, meter)
        meter.step = None
        if meter.is_due:
            meter.after()
        return output

    setattr(execute, _HOOKED, True)
    Worker.execute_model, Worker.sample_tokens = execute, sample


def own_meter(worker: Any) -> RankMeter:
    """Give a worker in the scheduler's process a meter."""
    return _make_meter(worker, None)


def paged_meter(worker: Any) -> str:
    """Give a worker in a process of its own a meter; the page that it keeps."""
    page = rank_page(Path(os.environ[RUNTIME_DIR]), int(worker.rank))
    _make_meter(worker, page)
    return str(page)


def _make_meter(wrapper: Any, page: Path | None) -> RankMeter:
    """VLLM hands out the wrapper of a worker; steps run in the worker itself."""
    hook_steps()
    worker = wrapper.worker
    ranks = int(worker.vllm_config.parallel_config.tensor_parallel_size)
    meter = RankMeter(step_memory(worker.device, ranks=ranks), page)
    setattr(worker, METER, meter)
    return meter


def _may_be_lost(worker: Any, meter: RankMeter, error: Exception) -> bool:
    """Whether memory ran out where nothing but the step is lost; the log says so, or why not."""
    if not is_out_of_memory(error):
        return False
    step = cast(SchedulerOutput, meter.step)
    taken_back = can_be_taken_back(worker.vllm_config, step)
    _tell(worker, meter, step, error, taken_back=taken_back)
    return taken_back


def _lose(worker: Any, meter: RankMeter) -> Any:
    """What a lost step gives; the error, and all that its frames held, must be gone by now."""
    step = cast(SchedulerOutput, meter.step)
    meter.after(completed=False)
    meter.memory.give_back()
    return lose(worker.model_runner, step)


def _tell(
    worker: Any, meter: RankMeter, step: SchedulerOutput, error: Exception, *, taken_back: bool
) -> None:
    order, reading = order_of(step), meter.memory.figures().reading(None)
    logger.error(
        "rank %d ran out of memory in a step of %d tokens: %s, %d of %d are in use now. %s: %s",
        worker.rank,
        step.total_num_scheduled_tokens,
        _predicted(order),
        reading.used_bytes,
        reading.cap_bytes,
        "The step is taken back" if taken_back else "It cannot be taken back, vLLM ends",
        str(error).partition("\n")[0],
    )


def _predicted(order: Order | tuple[()] | None) -> str:
    if not order or not order.needed_bytes:
        return "the gate was not asked about a prefill in it"
    return f"{order.needed_bytes} bytes were predicted with their margin"
