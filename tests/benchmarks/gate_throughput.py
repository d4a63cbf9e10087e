"""What the prefill gate costs a server away from its cap: the same requests with it and without.

One server of each engine, whose gate is switched between rounds; which mode comes first alternates.
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

from rich.table import Table

from tests.support.engine_server import EngineServer
from tests.support.engines import SGLANG, VLLM, Engine
from tests.support.gate_models import QUICK
from tests.support.sglang_server import sglang_server

__all__ = ["gate_throughput"]

CLIENTS, PROMPT, TOKENS = 4, 200, 60
WARMING = 4
"""Rounds of each mode before any is timed."""


def gate_throughput(folder: Path, sglang_python: Path, *, pairs: int) -> Table:
    """Seconds of a round with the gate over one without, less one: median and quartiles."""
    table = Table(title=f"{CLIENTS} clients, {PROMPT} tokens in, {TOKENS} out: enforced / off - 1")
    for column in ("engine", "pairs", "p25", "median", "p75", "a round, off"):
        table.add_column(column, justify="right" if column != "engine" else "left")
    sglang = replace(SGLANG, serve=partial(sglang_server, python=sglang_python))
    for engine in (VLLM, sglang):
        place = folder / f"throughput-{engine.kind}"
        place.mkdir()
        rounds = list(_rounds(engine, place, pairs))
        quartiles = statistics.quantiles([with_it / off - 1 for off, with_it in rounds], n=4)
        off = statistics.median(off for off, _ in rounds)
        figures = [f"{100 * each:+.1f} %" for each in quartiles]
        table.add_row(engine.kind, str(pairs), *figures, f"{off:.2f} s")
    return table


def _rounds(engine: Engine, folder: Path, pairs: int) -> Iterator[tuple[float, float]]:
    """Seconds of a round with the gate off, and with it enforced."""
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


def _round(server: EngineServer, mode: str, seed: int) -> float:
    server.admin.patch("/prefill-gate", json={"mode": mode}).raise_for_status()
    chance = random.Random(seed)
    prompts = [[chance.randrange(1, QUICK.vocab) for _ in range(PROMPT)] for _ in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        began = time.perf_counter()
        for response in pool.map(lambda prompt: server.complete(prompt, TOKENS), prompts):
            response.raise_for_status()
        return time.perf_counter() - began
