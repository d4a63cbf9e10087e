"""Orders of the prefill gate to vLLM's workers, and the meters that follow them.

An order travels on the scheduler's output, to workers in other processes too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from vllm.v1.core.sched.output import SchedulerOutput

from engine_plugins.admin.runtime_dir import RUNTIME_DIR
from engine_plugins.prefill_gate.rank_meter import RankMeter, StepOrder, rank_page
from engine_plugins.prefill_gate.step_memory import step_memory

__all__ = [
    "METER",
    "NOTHING_TO_DO",
    "ORDER",
    "Order",
    "order_of",
    "own_meter",
    "paged_meter",
]

ORDER = "engine_plugins_order"
"""Attribute of a scheduler's output: an order to the workers that run the step."""
METER = "_engine_plugins_meter"
"""Attribute of a worker: its meter, where a gate has asked for one."""


class Order(NamedTuple):
    """What to do about a step; it may be lost whatever it is.

    Attributes:
        step: for the meter.
        needed_bytes: what the step was predicted to need; 0 for one without prefills.
    """

    step: StepOrder
    needed_bytes: int


NOTHING_TO_DO = ()
"""In place of an order, of most steps: it is quick to send."""


def order_of(scheduler_output: SchedulerOutput) -> Order | tuple[()] | None:
    """The order that came with a step, if any did."""
    return getattr(scheduler_output, ORDER, None)


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
    worker = wrapper.worker
    ranks = int(worker.vllm_config.parallel_config.tensor_parallel_size)
    meter = RankMeter(step_memory(worker.device, ranks=ranks), page)
    setattr(worker, METER, meter)
    return meter
