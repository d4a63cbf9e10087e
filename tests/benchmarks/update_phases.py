"""Where the seconds of an update go, on a real vLLM server."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from engine_plugins import WeightSender
from engine_plugins.weights.report import UpdateReport
from tests.support.engine_server import TOKEN
from tests.support.sized_models import sized_qwen3
from tests.support.vllm_server import vllm_server

UPDATES = 5

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


def update_phases(folder: Path) -> Table:
    """Milliseconds by phase: the first update, then medians of later ones, in both modes."""
    model = sized_qwen3()
    model.save_pretrained(folder / "served")
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    with (
        vllm_server(folder / "served", folder / "server.log") as server,
        WeightSender.from_hf(
            model.named_parameters(), engines=server.url, token=TOKEN, config=model.config
        ) as sender,
    ):
        first = _updates(sender, range(1, 2), "in_place")
        in_place = _updates(sender, range(2, 2 + UPDATES), "in_place")
        staged = _updates(sender, range(20, 21 + UPDATES), "staged")[1:]
    table = Table(title=f"update of {nbytes / 1e6:.0f} MB, vLLM on CPU, TP1: milliseconds")
    for column in ("phase", "first", f"in place (median of {UPDATES})", f"staged (of {UPDATES})"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, seconds in PHASES.items():
        table.add_row(phase, *(_median(runs, seconds) for runs in (first, in_place, staged)))
    table.add_row("wire GB/s", *(_rate(runs) for runs in (first, in_place, staged)))
    table.add_row("peak extra MiB", *(_peak(runs) for runs in (first, in_place, staged)))
    return table


def _updates(sender: WeightSender, versions: range, mode: Any) -> list[UpdateReport]:
    return [
        report
        for version in versions
        for report in sender.update(version, mode=mode).engines.values()
    ]


def _median(runs: list[UpdateReport], seconds: Callable[[UpdateReport], float]) -> str:
    return f"{statistics.median(map(seconds, runs)) * 1e3:.1f}"


def _rate(runs: list[UpdateReport]) -> str:
    return f"{statistics.median(report.gbps for report in runs):.2f}"


def _peak(runs: list[UpdateReport]) -> str:
    return f"{max(report.peak_extra_bytes for report in runs) / (1 << 20):.0f}"
