"""What the prefill gate takes of an engine's steps, one in eight of which has a prefill.

vLLM's own scheduler runs with a made-up model that takes memory, in one process. SGLang is a server
in use. Timed is what our methods take, without the engine's within them.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.table import Table
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from engine_plugins.prefill_gate.rank_meter import PagedRanks, RankMeter, StepOrder
from engine_plugins.prefill_gate.step_memory import HostStepMemory
from engine_plugins.prefill_gate.step_shape import StepShape
from tests.support.gate_clock import GateClock
from tests.support.gate_models import QUICK
from tests.support.scheduled_vllm import scheduled_vllm
from tests.support.sglang_server import sglang_server
from vllm_ext.prefill_gate import largest_step
from vllm_ext.step_order import order_of

__all__ = ["gate_steps"]

STEPS, WARMING = 4000, 500
ONE_IN, RUNNING = 8, 20
TOKEN_FLOATS = 10 << 10
"""That the made-up model takes for a token."""
CLIENTS, LIVE_REQUESTS, WARMING_REQUESTS = 6, 150, 50
TIMES = "GATE_TIMES"
RAMP = 100
"""Steps after a change of mode, while the requests become as many as there are clients."""
CALIBRATED = (32, 64, 128, 256, 512, 1024, 2048)
OURS = {
    "is_ready": "_is_ready",
    "look_up": "_look_up",
    "size": "_size",
    "schedule": "_schedule",
    "update_from_output": "_update",
    "free_request": "_free",
}
"""Our methods, and vLLM's that they call."""
FURTHER = 8
Largest = Callable[[Scheduler], StepShape | None]


def _never_measured(scheduler: Scheduler) -> StepShape:
    """A step so large that it was never measured, so that it is seen how large each step is."""
    largest = largest_step(scheduler)
    return largest._replace(tokens=FURTHER * largest.tokens, pairs=FURTHER * largest.pairs)


def _never_cleared(scheduler: Scheduler) -> None:
    return None


REGIMES: dict[str, tuple[str, Largest]] = {
    "gate off": ("off", largest_step),
    "away from the cap": ("enforce", largest_step),
    "nearer to it, small steps are cleared": ("enforce", _never_measured),
    "at the cap, every prefill is judged": ("enforce", _never_cleared),
}
"""The gate's mode, and what it takes for the largest step that an engine makes."""


def gate_steps(folder: Path, sglang_python: Path) -> Table:
    """Microseconds of a step: median, 99th percentile."""
    table = Table(title="What the gate takes of a step, in microseconds")
    for column in ("", "p50", "p99"):
        table.add_column(column, justify="right" if column else "left")
    for where, (mode, largest) in REGIMES.items():
        place = folder / where.partition(",")[0]
        place.mkdir()
        table.add_row(f"vLLM, {where}", *_percentiles(_steps(place, mode, largest)))
    for mode, took in _live_steps(folder, sglang_python).items():
        table.add_row(f"SGLang, a server in use, gate {mode}", *_percentiles(took))
    return table


def _percentiles(took: list[float]) -> tuple[str, str]:
    return f"{statistics.median(took):.1f}", f"{statistics.quantiles(took, n=100)[-1]:.1f}"


def _live_steps(folder: Path, sglang_python: Path) -> dict[str, list[float]]:
    """Microseconds of each step of an SGLang server, by its gate's mode, once all sizes are known.

    The clock's own calls take longer between two steps of a model than one after the other: what is
    left with the gate off is theirs.
    """
    times, chance = folder / "times", random.Random(1)

    def prompt(tokens: int) -> list[int]:
        return [chance.randrange(1, QUICK.vocab) for _ in range(tokens)]

    def served(requests: int, mode: str) -> list[float]:
        server.admin.patch("/prefill-gate", json={"mode": mode}).raise_for_status()
        asked = [
            (prompt(chance.randint(20, 1000)), chance.randint(1, 2 * ONE_IN * CLIENTS))
            for _ in range(requests)
        ]
        before = len(times.read_text().splitlines()) + RAMP
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda each: server.greedy(*each), asked))
        return [int(line) / 1e3 for line in times.read_text().splitlines()[before:]]

    times.touch()
    with sglang_server(
        QUICK.copy_to(folder / "model"),
        folder / "server.log",
        python=sglang_python,
        launcher="tests.support.timed_sglang",
        arguments=["--engine-plugins-prefill-gate", "enforce", "--max-total-tokens", "16384"],
        environment={
            TIMES: str(times),
            "ENGINE_PLUGINS_PREFILL_CALIBRATION_DIR": str(folder / "calibration"),
        },
    ) as server:
        for tokens in CALIBRATED * 3:
            server.greedy(prompt(tokens), 1)
        served(WARMING_REQUESTS, "enforce")
        return {mode: served(LIVE_REQUESTS, mode) for mode in ("off", "enforce")}


def _steps(folder: Path, mode: str, largest: Largest) -> list[float]:
    """Microseconds of each step in the scheduler and in the rank.

    With the gate off what is left are the clock's own calls, between two steps.
    """
    meter = RankMeter(HostStepMemory(ranks=1), folder / "rank.page")
    engine = scheduled_vllm(
        folder,
        PagedRanks([folder / "rank.page"]),
        mode=mode,
        places=2 * RUNNING,
        largest=largest,
    )
    clock = GateClock(time.thread_time_ns)
    gated, scheduler = engine.gated, engine.scheduler
    for ours, theirs in OURS.items():
        setattr(gated, theirs, clock.timed(getattr(gated, theirs), ours=False))
        setattr(gated, ours, clock.timed(getattr(gated, ours), ours=True))
    scheduler.schedule, scheduler.update_from_output = gated.schedule, gated.update_from_output
    scheduler._free_request = gated.free_request
    chance = random.Random(1)
    totals, bounded = [], 0
    gc.collect()
    gc.disable()
    try:
        for number in range(STEPS):
            if number % ONE_IN == 0:
                prompt = [chance.randrange(100) for _ in range(chance.randint(20, 1000))]
                engine.add(str(number), prompt, max_tokens=ONE_IN * RUNNING)
            engine.step()
            engine.outputs.clear()
            _in_rank(clock, meter, engine.last)
            bounded += engine.gate.clearance.is_bounded
            totals.append(clock.nanoseconds)
    finally:
        gc.enable()
    if (bounded > STEPS // 2) != (largest is _never_measured):
        raise RuntimeError(f"of {STEPS} steps {bounded} were cleared by their size: not this table")
    return [(after - before) / 1e3 for before, after in pairwise(totals)][WARMING:]


def _in_rank(clock: GateClock, meter: RankMeter, step: SchedulerOutput) -> None:
    """A model's step takes memory; around it nothing is done where no order came with it."""
    order = order_of(step)
    before, after = (_nothing, _nothing) if order is None else (meter.before, meter.after)
    clock.timed(before, ours=True)(None if order is None else order.step)
    np.ones((step.total_num_scheduled_tokens, TOKEN_FLOATS), dtype=np.float32)
    clock.timed(after, ours=True)()


def _nothing(order: StepOrder | None = None) -> None:
    pass
