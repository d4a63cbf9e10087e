"""Trace, intersection and manifests of large models, config only: how they grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.benchmarks.plan_sources import CASES
from tests.support.engine_server import ROOT
from tests.support.sglang_server import SGLANG_SHIMS

__all__ = ["plan_scale", "plan_sources"]


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One engine rank and one trainer, as `plan_rank` takes them."""

    engine: str
    model: str
    rank: str
    arguments: str


_LARGE = "--shape 1t --tp 128 --expert-parallel"
_CASES = [
    _Case(
        engine="vllm",
        model="30B-A3B",
        rank="TP2",
        arguments="--shape 30b --tp 2 --trainer 8 2 4",
    ),
    _Case(
        engine="sglang",
        model="30B-A3B",
        rank="TP2",
        arguments="--shape 30b --tp 2 --trainer 8 2 4",
    ),
    _Case(
        engine="vllm",
        model="1T",
        rank="1 of 128, EP",
        arguments=f"{_LARGE} --trainer 256 8 32",
    ),
    _Case(
        engine="vllm",
        model="1T, ranks x2",
        rank="1 of 128, EP",
        arguments=f"{_LARGE} --trainer 512 8 32",
    ),
    _Case(
        engine="vllm",
        model="1T, layers x2",
        rank="1 of 128, EP",
        arguments=f"{_LARGE} --layers 122 --trainer 256 8 32",
    ),
]


def plan_scale(sglang_python: Path, *, runs: int) -> Table:
    """One row for each case, each in a process of its own; processor seconds, medians."""
    table = Table(title="From manifests to a plan, on one engine rank; processor seconds")
    for column in (
        "engine",
        "model",
        "rank",
        "HF tensors",
        "trainer",
        "bytes of a manifest",
        "loader alone",
        "trace",
        "read manifests",
        "group",
        "intersect",
        "again, same memory",
        "again, moved",
        "peak MiB",
        "operations",
    ):
        table.add_column(column, justify="right")
    for case in _CASES:
        python = sys.executable if case.engine == "vllm" else str(sglang_python)
        found = _run([python, "-m", "tests.benchmarks.plan_rank", *case.arguments.split()], runs)
        table.add_row(case.engine, case.model, case.rank, *_cells(found))
    return table


def plan_sources(*, runs: int) -> Table:
    """The same for the manifests of larger jobs, with what it takes to read them."""
    table = Table(title="Manifests of large jobs, to one rank's plan; processor seconds")
    for column in (
        "model",
        "HF tensors",
        "trainer",
        "engine rank",
        "boxes",
        "MB of manifests",
        "read",
        "agree",
        "plan",
        "the rank in all",
        "check (once an engine)",
        "MiB held",
        "operations",
    ):
        table.add_column(column, justify="right")
    for case in CASES:
        found = _run(
            [sys.executable, "-m", "tests.benchmarks.plan_sources", "--case", case], min(runs, 3)
        )
        seconds = [found[name] for name in ("read_s", "agree_s", "plan_s")]
        table.add_row(
            found["model"],
            f"{found['tensors']:,}",
            found["trainer"],
            found["engine"],
            f"{found['boxes']:,}",
            f"{found['bytes'] / 1e6:.0f}",
            *(f"{each:.2f}" for each in (*seconds, sum(seconds), found["check_s"])),
            f"{found['held_mib']:.0f}",
            f"{found['operations']:,}",
        )
    return table


def _run(command: Sequence[str], runs: int) -> dict[str, Any]:
    environment = os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(SGLANG_SHIMS)}
    done = subprocess.run(
        [*command, "--runs", str(runs)],
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _cells(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['tensors']:,}",
        found["trainer"],
        f"{found['manifest_bytes']:,}",
        f"{found['bare_s']:.2f}",
        f"{found['trace_s']:.2f} ({found['trace_s'] / found['bare_s']:.2f})",
        f"{found['agree_s']:.2f}",
        f"{found['group_s']:.2f}",
        f"{found['plan_s']:.3f}",
        f"{found['same_s']:.4f}",
        f"{found['moved_s']:.3f}",
        f"{found['peak_mib']:.0f}",
        f"{found['operations']:,}",
    ]
