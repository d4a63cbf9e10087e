"""What the prefill gate costs the steps of vLLM's own scheduler, and of the rank that runs them.

Requests come so that one step in eight has a prefill; the model is made up. Timed is what our
methods take, without vLLM's within them.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from engine_plugins.prefill_gate.rank_meter import PagedRanks, RankMeter
from engine_plugins.prefill_gate.step_memory import HostStepMemory
from tests.support.scheduled_vllm import scheduled_vllm
from vllm_ext.step_order import order_of

__all__ = ["gate_steps"]

STEPS, WARMING = 4000, 500
ONE_IN, RUNNING = 8, 20
OURS = {
    "is_ready": "_is_ready",
    "look_up": "_look_up",
    "size": "_size",
    "schedule": "_schedule",
    "update_from_output": "_update",
    "free_request": "_free",
}
"""Our methods, and vLLM's that they call."""


def gate_steps(folder: Path) -> Table:
    """Microseconds of a step: median, 99th percentile."""
    table = Table(title=f"A step of vLLM, one in {ONE_IN} with a prefill: microseconds of the gate")
    for column in ("", "scheduler, p50", "p99", "rank, p50", "p99", "both, p50", "p99"):
        table.add_column(column, justify="right" if column else "left")
    for name, clears in (("away from the cap", True), ("where no step is cleared", False)):
        place = folder / name
        place.mkdir()
        scheduler, rank = _steps(place, clears=clears)
        both = [one + other for one, other in zip(scheduler, rank, strict=True)]
        figures = [
            f"{each:.1f}"
            for took in (scheduler, rank, both)
            for each in (statistics.median(took), statistics.quantiles(took, n=100)[-1])
        ]
        table.add_row(name, *figures)
    return table


class _Clock:
    """Adds up the time within our methods, without that of vLLM's that they call, nor its own."""

    def __init__(self) -> None:
        self.nanoseconds = 0
        self._ours, self._since = False, 0
        self._own = 0
        self._own = _median_of_nothing(self)

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
        now, before = time.perf_counter_ns(), self._ours
        if before:
            self.nanoseconds += now - self._since - self._own
        self._ours, self._since = ours, now
        return before


def _median_of_nothing(clock: _Clock) -> int:
    """Nanoseconds that a clock counts for a method of ours that does nothing."""
    nothing, counted = clock.timed(lambda: None, ours=True), []
    for _ in range(1000):
        before = clock.nanoseconds
        nothing()
        counted.append(clock.nanoseconds - before)
    clock.nanoseconds = 0
    return round(statistics.median(counted))


def _steps(folder: Path, *, clears: bool) -> tuple[list[float], list[float]]:
    """Microseconds of each step in the scheduler and in the rank."""
    meter = RankMeter(HostStepMemory(ranks=1), folder / "rank.page")
    engine = scheduled_vllm(
        folder,
        PagedRanks([folder / "rank.page"]),
        mode="enforce",
        places=2 * RUNNING,
        clears=clears,
    )
    clock, rank_clock = _Clock(), _Clock()
    gated, scheduler = engine.gated, engine.scheduler
    for ours, theirs in OURS.items():
        setattr(gated, theirs, clock.timed(getattr(gated, theirs), ours=False))
        setattr(gated, ours, clock.timed(getattr(gated, ours), ours=True))
    scheduler.schedule, scheduler.update_from_output = gated.schedule, gated.update_from_output
    scheduler._free_request = gated.free_request
    chance = random.Random(1)
    totals = []
    gc.collect()
    gc.disable()
    try:
        for number in range(STEPS):
            if number % ONE_IN == 0:
                prompt = [chance.randrange(100) for _ in range(chance.randint(20, 1000))]
                engine.add(str(number), prompt, max_tokens=ONE_IN * RUNNING)
            engine.step()
            engine.outputs.clear()
            order = order_of(engine.last)
            if order is not None:
                rank_clock.timed(meter.before, ours=True)(order.step)
                rank_clock.timed(meter.after, ours=True)()
            totals.append((clock.nanoseconds, rank_clock.nanoseconds))
    finally:
        gc.enable()
    steps = [
        [(after - before) / 1e3 for before, after in pairwise(each)][WARMING:]
        for each in zip(*totals, strict=True)
    ]
    return steps[0], steps[1]
