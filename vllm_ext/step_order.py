"""Orders of the prefill gate to vLLM's workers.

An order travels on the scheduler's output, to workers in other processes too.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm.v1.core.sched.output import SchedulerOutput

from engine_plugins.prefill_gate.rank_meter import StepOrder

__all__ = [
    "METER",
    "NOTHING_TO_DO",
    "ORDER",
    "Order",
    "order_of",
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
