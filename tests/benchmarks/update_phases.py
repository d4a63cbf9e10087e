"""Where the time of an update goes, on real servers of both engines."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from engine_plugins import WeightSender
from engine_plugins.weights.contract.report import UpdateReport
from tests.support.engine_server import ROOT, TOKEN
from tests.support.sglang_server import sglang_server
from tests.support.sized_models import sized_qwen3
from tests.support.vllm_server import vllm_server

SGLANG_PYTHON = ROOT / ".venv" / "sglang" / "bin" / "python"
"""SGLang has pins of its own, so its server runs in its own environment."""

PHASES: dict[str, Callable[[UpdateReport], float]] = {
    "connect": lambda report: report.phases.connect_s,
    "plan": lambda report: report.phases.plan_s,
    "wire": lambda report: report.phases.pull_s,
    "pause": lambda report: report.phases.pause_s,
    "install": lambda report: report.phases.install_s,
    "flush": lambda report: report.phases.flush_s,
    "resume": lambda report: report.phases.resume_s,
    "whole update": lambda report: report.seconds,
    "generation stood still": lambda report: report.paused_s,
}

Runs = dict[str, list[UpdateReport]]
"""Reports by engine."""


def update_phases(folder: Path, *, pairs: int) -> Table:
    """Milliseconds by phase, of one model and one trainer process that updates both engines.

    The first update of each engine, then medians of `pairs` later ones in each mode.
    """
    model = sized_qwen3()
    served = folder / "served"
    model.save_pretrained(served)
    with contextlib.ExitStack() as stack:
        servers = {
            "vLLM": vllm_server(served, folder / "vllm.log"),
            "SGLang": sglang_server(
                served,
                folder / "sglang.log",
                arguments=["--engine-plugins-enable"],
                python=SGLANG_PYTHON,
            ),
        }
        urls = {engine: stack.enter_context(server).url for engine, server in servers.items()}
        senders = {
            engine: stack.enter_context(
                WeightSender.from_hf(
                    model.named_parameters(), engines=url, token=TOKEN, config=model.config
                )
            )
            for engine, url in urls.items()
        }
        first = _in_turn(senders, range(1, 2), "in_place")
        in_place = _in_turn(senders, range(2, 2 + pairs), "in_place")
        _in_turn(senders, range(2 + pairs, 3 + pairs), "staged")  # makes the larger buffer
        staged = _in_turn(senders, range(3 + pairs, 3 + 2 * pairs), "staged")
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    return _table(
        f"update of {nbytes / 1e6:.0f} MB, CPU, TP1: milliseconds (medians of {pairs})",
        {"first": first, "in place": in_place, "staged": staged},
    )


def _in_turn(senders: Mapping[str, WeightSender], versions: range, mode: Any) -> Runs:
    """Update the engines one after the other, each version in the other order than the last."""
    runs: Runs = {engine: [] for engine in senders}
    for version in versions:
        for engine in list(senders)[:: 1 if version % 2 else -1]:
            runs[engine] += senders[engine].update(version, mode=mode).engines.values()
    return runs


def _table(title: str, columns: Mapping[str, Runs]) -> Table:
    table = Table(title=title)
    table.add_column("phase")
    for column, runs in columns.items():
        for engine in runs:
            table.add_column(f"{column}\n{engine}", justify="right")
    measured = [reports for runs in columns.values() for reports in runs.values()]
    for phase, seconds in PHASES.items():
        table.add_row(phase, *(_milliseconds(reports, seconds) for reports in measured))
    table.add_row("wire GB/s", *(_rate(reports) for reports in measured))
    table.add_row("peak extra MiB", *(_peak(reports) for reports in measured))
    return table


def _milliseconds(reports: list[UpdateReport], seconds: Callable[[UpdateReport], float]) -> str:
    return f"{statistics.median(map(seconds, reports)) * 1e3:.1f}"


def _rate(reports: list[UpdateReport]) -> str:
    return f"{statistics.median(report.gbps for report in reports):.2f}"


def _peak(reports: list[UpdateReport]) -> str:
    return f"{max(report.peak_extra_bytes for report in reports) / (1 << 20):.0f}"
