"""What the prefill gate costs a server away from its cap: the same requests with it and without.

One server of each engine, whose gate is switched between rounds; which mode comes first alternates.
Told are seconds, which everything else on the machine moves too, and the processor's time that the
server's processes took, which says what a round costs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.table import Table

from tests.support.engine_server import EngineServer
from tests.support.engines import SGLANG, VLLM, Engine
from tests.support.gate_models import QUICK
from tests.support.sglang_server import sglang_server

__all__ = ["gate_throughput"]

CLIENTS, REQUESTS, PROMPT, TOKENS = 4, 16, 200, 60
WARMING = 3
"""Rounds of each mode before any is timed."""


def gate_throughput(folder: Path, sglang_python: Path, *, pairs: int) -> Table:
    """A round with the gate over one without, less one: median and quartiles."""
    title = f"{REQUESTS} requests of {CLIENTS} clients, {PROMPT} tokens in, {TOKENS} out"
    table = Table(title=f"{title}: enforced / off - 1")
    for column in ("engine", "of", "pairs", "p25", "median", "p75", "a round, off"):
        table.add_column(column, justify="left" if column in ("engine", "of") else "right")
    sglang = replace(SGLANG, serve=partial(sglang_server, python=sglang_python))
    for engine in (VLLM, sglang):
        place = folder / f"throughput-{engine.kind}"
        place.mkdir()
        rounds = list(_rounds(engine, place, pairs))
        for what in _Round._fields:
            seconds = [[float(getattr(each, what)) for each in pair] for pair in rounds]
            ratios = [with_it / off - 1 for off, with_it in seconds]
            quartiles = [f"{100 * each:+.1f} %" for each in statistics.quantiles(ratios, n=4)]
            off_s = statistics.median(off for off, _ in seconds)
            table.add_row(engine.kind, what, str(pairs), *quartiles, f"{off_s:.2f} s")
    return table


class _Round(NamedTuple):
    """Seconds that a round took, by the clock and of the processor."""

    clock: float
    processor: float


def _rounds(engine: Engine, folder: Path, pairs: int) -> Iterator[tuple[_Round, _Round]]:
    """A round with the gate off, and with it enforced."""
    seeds = count()
    arguments = ["--engine-plugins-enable"] if engine.kind == "sglang" else []
    with engine.serve(
        QUICK.copy_to(folder / "model"),
        folder / "server.log",
        arguments=arguments,
        environment={"ENGINE_PLUGINS_PREFILL_CALIBRATION_DIR": str(folder / "calibration")},
    ) as server:
        for mode in ("enforce", "off") * WARMING:
            _round(server, mode, next(seeds))
        for place in range(pairs):
            modes = ("off", "enforce") if place % 2 else ("enforce", "off")
            took = {mode: _round(server, mode, next(seeds)) for mode in modes}
            yield took["off"], took["enforce"]


def _round(server: EngineServer, mode: str, seed: int) -> _Round:
    server.admin.patch("/prefill-gate", json={"mode": mode}).raise_for_status()
    chance = random.Random(seed)
    prompts = [[chance.randrange(1, QUICK.vocab) for _ in range(PROMPT)] for _ in range(REQUESTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        began, used = time.perf_counter(), _processor_s(server)
        for response in pool.map(lambda prompt: server.complete(prompt, TOKENS), prompts):
            response.raise_for_status()
        return _Round(time.perf_counter() - began, _processor_s(server) - used)


def _processor_s(server: EngineServer) -> float:
    """Seconds that all processes of a server have computed."""
    first = psutil.Process(server.pid)
    times = [each.cpu_times() for each in (first, *first.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))
