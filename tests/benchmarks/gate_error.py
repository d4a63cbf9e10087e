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

from tests.support.besieged import FITTED, Siege, besieged
from tests.support.chaos import scored
from tests.support.engines import SGLANG, VLLM, Engine
from tests.support.gate_models import DENSE, MOE, GateModel
from tests.support.sglang_server import sglang_server

__all__ = ["gate_error"]

SERVED_BEFORE = 64
"""Prompts of any length that come first, and whose measurements are forgotten.

An engine grows for a while: workspaces with the longest prompt, oneDNN with the kernels of each new
length, a MiB each, until it has all that it may keep.
"""
PREDICTED = 24
"""Prompts of other lengths: so few that each is measured; of sizes known well one in a few is."""


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
        calibrated = f"{len(FITTED)} lengths"
        asks: dict[str, Callable[[list[int]], httpx.Response]] = {
            "plain": lambda prompt: siege.server.complete(prompt, 1),
            "prompt_logprobs": lambda prompt: scored(siege.server, prompt),
        }
        chance = random.Random(11)
        siege.warm(chance.randint(min(FITTED), max(FITTED)) for _ in range(SERVED_BEFORE))
        for kind, ask in asks.items():
            for tokens in FITTED:
                ask(siege.prompt(tokens)).raise_for_status()
            steps = list(_measured(siege, ask, logprobs=kind != "plain"))
            errors = sorted(
                abs(step["predicted_bytes"] / step["measured_bytes"] - 1) for step in steps
            )
            p95 = statistics.quantiles(errors, n=20, method="inclusive")[-1]
            p50 = statistics.median(errors)
            figures = [f"{100 * p50:.2f} %", f"{100 * p95:.2f} %"]
            yield [engine.kind, name, kind, calibrated, str(len(steps)), *figures]


def _measured(
    siege: Siege, ask: Callable[[list[int]], httpx.Response], *, logprobs: bool
) -> Iterator[dict[str, Any]]:
    """Prompts of lengths that the line was not drawn from, as the gate saw them."""
    chance = random.Random(7)
    least, most = min(FITTED), max(FITTED)
    for place in range(PREDICTED):
        tokens = round(least * (most / least) ** ((place + chance.random()) / PREDICTED))
        if tokens in FITTED:
            tokens += 1
        ask(siege.prompt(tokens, 2)).raise_for_status()
        ask(siege.prompt(4)).raise_for_status()  # what was measured is told at the next step
        for step in reversed(siege.gate()["recent"]):
            if step["tokens"] == tokens and bool(step["prompt_logprob_rows"]) == logprobs:
                yield step
                break
