"""How far the gate's predictions are from what steps of real engines take.

Lines are drawn from prompts of a few lengths; the figures are of prompts of other lengths, each
predicted before it was learned. One server at a time, one request at a time.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.table import Table

from tests.support.besieged import Siege, besieged
from tests.support.chaos import scored
from tests.support.engines import SGLANG, VLLM, Engine
from tests.support.gate_models import DENSE, MOE, GateModel
from tests.support.sglang_server import sglang_server

__all__ = ["gate_error"]

PER_SIZE = 4
"""Prompts of each power of two: with the calibration's, no more than a line keeps of a size."""
SIZES = (64, 128, 256, 512, 1024, 2048)


def gate_error(folder: Path, sglang_python: Path) -> Table:
    """Relative error of predicted peaks: median and 95th percentile of each regime."""
    table = Table(title="Peaks of prefill steps: predicted / measured by the kernel - 1")
    for column in ("engine", "model", "steps", "calibrated with", "predicted", "p50", "p95"):
        table.add_column(column)
    sglang = replace(SGLANG, serve=partial(sglang_server, python=sglang_python))
    for engine in (VLLM, sglang):
        for name, model in (("dense", DENSE), ("MoE", MOE)):
            place = folder / f"{engine.kind}-{name}"
            place.mkdir()
            for row in _rows(engine, name, model, place):
                table.add_row(*row)
    return table


def _rows(engine: Engine, name: str, model: GateModel, folder: Path) -> Iterator[list[str]]:
    with besieged(engine, folder, mode="observe", model=model) as siege:
        calibrated = "3 each of " + ", ".join(map(str, SIZES))
        asks: dict[str, Callable[[list[int]], httpx.Response]] = {
            "plain": lambda prompt: siege.server.complete(prompt, 1),
            "prompt_logprobs": lambda prompt: scored(siege.server, prompt),
        }
        for kind, ask in asks.items():
            for tokens in SIZES:
                for seed in range(3):
                    ask(siege.prompt(tokens, seed)).raise_for_status()
            steps = list(_measured(siege, ask, logprobs=kind != "plain"))
            errors = sorted(
                abs(step["predicted_bytes"] / step["measured_bytes"] - 1) for step in steps
            )
            p95 = statistics.quantiles(errors, n=20)[-1]
            p50 = statistics.median(errors)
            figures = [f"{100 * p50:.2f} %", f"{100 * p95:.2f} %"]
            yield [engine.kind, name, kind, calibrated, str(len(steps)), *figures]


def _measured(
    siege: Siege, ask: Callable[[list[int]], httpx.Response], *, logprobs: bool
) -> Iterator[dict[str, Any]]:
    """Prompts of lengths that the line was not drawn from, as the gate saw them."""
    chance = random.Random(7)
    for size in SIZES:
        for _ in range(PER_SIZE):
            tokens = chance.randint(size + 1, 2 * size - 1)
            ask(siege.prompt(tokens, chance.randrange(1 << 30))).raise_for_status()
            ask(siege.prompt(4)).raise_for_status()  # what was measured is told at the next step
            for step in reversed(siege.gate()["recent"]):
                rows = step["prompt_logprob_rows"]
                if step["tokens"] == tokens and bool(rows) == logprobs:
                    yield step
                    break
