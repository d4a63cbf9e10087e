"""What the prefill gate costs a step: one prefill judged, and what else a step asks of it.

Each call is timed by itself, in processor time of its thread, with Python's collector at rest.
*Tight* is a prefill for which the largest chunk that fits is searched for.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

from rich.table import Table

from engine_plugins.prefill_gate.engine_gate import EngineGate
from engine_plugins.prefill_gate.entry import EntryKind
from engine_plugins.prefill_gate.gate import PrefillGate
from engine_plugins.prefill_gate.memory_cap import HostFigures, Reading, read_host, resolve_cap
from engine_plugins.prefill_gate.rank_meter import OwnRank, RankMeter
from engine_plugins.prefill_gate.step_memory import HostStepMemory
from engine_plugins.prefill_gate.step_shape import NOTHING, Candidate, StepShape
from engine_plugins.settings import Settings
from tests.support.simulated_steps import MIB, a_memory, calibrated, true_peak

__all__ = ["gate_cost"]

CALLS = 20_000
ROOMY, TIGHT = 100_000 * MIB, 200 * MIB


def gate_cost() -> Table:
    """Microseconds of a call: median, 99th percentile."""
    table = Table(title="The prefill gate's cost, microseconds of the processor")
    for column in ("", "p50", "p99"):
        table.add_column(column, justify="right" if column else "left")
    cap = resolve_cap(None, HostFigures.now())
    calls = {
        "begin a step and judge a prefill": lambda: _steps(ROOMY),
        "the same, tight": lambda: _steps(TIGHT),
        "read memory in use (host)": lambda: iter([partial(read_host, cap)] * CALLS),
        "learn from a step": _observations,
        "all of a scheduler's step with one prefill (real memory)": _engine_steps,
    }
    gc.collect()
    gc.disable()
    try:
        for name, steps in calls.items():
            table.add_row(name, *(f"{each:.1f}" for each in _percentiles(steps())))
    finally:
        gc.enable()
    return table


def _percentiles(calls: Iterator[Callable[[], object]]) -> tuple[float, float]:
    took = []
    for call in calls:
        began = time.thread_time_ns()
        call()
        took.append((time.thread_time_ns() - began) / 1e3)
    return statistics.median(took), statistics.quantiles(took, n=100)[-1]


def _steps(headroom: int) -> Iterator[Callable[[], object]]:
    chosen = Settings(prefill_gate="enforce", prefill_margin_bytes=8 * MIB)
    gate = PrefillGate(calibrated(a_memory()), chosen, smallest_chunk=64)
    sizes = random.Random(1)
    running = StepShape(tokens=20, rows=20)

    def step(number: int, tokens: int) -> None:
        gate.begin(Reading(0, headroom), running=running, in_flight=True, now=number / 100)
        gate.decide(Candidate(f"{number}", tokens, tokens))

    for number in range(CALLS):
        tokens = sizes.randint(5000, 8192) if headroom == TIGHT else sizes.randint(20, 8192)
        yield partial(step, number, tokens)


def _observations() -> Iterator[Callable[[], object]]:
    memory = calibrated(a_memory())
    noise = random.Random(2)
    for number in range(CALLS):
        tokens = noise.randint(20, 8192)
        shape = Candidate("x", tokens, tokens).joined_to(NOTHING, tokens)
        peak = true_peak(shape, noise)
        yield partial(memory.observe, shape, peak, at=float(number))


def _engine_steps() -> Iterator[Callable[[], object]]:
    """Figures of this process, a step begun, a prefill judged, an order for the rank."""
    settings = Settings(prefill_gate="enforce", prefill_margin_bytes=8 * MIB)
    gate = PrefillGate(calibrated(a_memory()), settings, smallest_chunk=64)
    ranks = OwnRank(RankMeter(HostStepMemory(ranks=1)))
    entry = EntryKind(max_prompt=8192, divisible=True, logprobs_held_bytes=20)
    engine = EngineGate(gate, settings, ranks, entry=entry)
    sizes = random.Random(3)
    running = StepShape(tokens=20, rows=20)

    def step(number: int, tokens: int) -> None:
        engine.begin(engine.figures(), running=running, in_flight=True)
        engine.decide(Candidate(f"{number}", tokens, tokens))
        engine.order(engine.gate.planned)
        engine.forget((f"{number}",), idle=False)

    for number in range(CALLS):
        yield partial(step, number, sizes.randint(20, 8192))
