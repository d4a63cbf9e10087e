"""How much memory an update takes beyond what the engine holds, beside its receive buffer.

The peak is what the reports say: the worker's high-water mark from the kernel over its resident
size before, a buffer that an earlier update left resident counted again. One server at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from engine_plugins import SenderReport, WeightSender
from engine_plugins.weights.contract.report import UpdateReport
from tests.support.engine_server import TOKEN, EngineServer
from tests.support.sglang_server import sglang_server
from tests.support.sized_models import sized_qwen3
from tests.support.vllm_server import vllm_server

__all__ = ["peaks"]

UPDATES = 3
Mode = Literal["in_place", "staged"]


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One server, and the modes that are measured on it."""

    engine: Literal["vLLM", "SGLang"]
    direct: bool
    modes: tuple[Mode, ...]

    @contextlib.contextmanager
    def server(self, served: Path, log: Path, sglang_python: Path) -> Iterator[EngineServer]:
        environment = {"ENGINE_PLUGINS_DIRECT_LANDING": str(self.direct).lower()}
        if self.engine == "vLLM":
            with vllm_server(served, log, environment=environment) as server:
                yield server
            return
        with sglang_server(
            served,
            log,
            arguments=["--engine-plugins-enable"],
            environment=environment,
            python=sglang_python,
        ) as server:
            yield server


CASES = [
    _Case(engine="vLLM", direct=False, modes=("in_place", "staged")),
    _Case(engine="SGLang", direct=False, modes=("in_place", "staged")),
    _Case(engine="SGLang", direct=True, modes=("in_place",)),
]


def peaks(folder: Path, sglang_python: Path) -> Table:
    """The table, MiB of one rank; the highest of a mode's updates."""
    model = sized_qwen3()
    served = folder / "peaks"
    model.save_pretrained(served)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    table = Table(title=f"peak extra memory of an update of {_mib(weights)} MiB, CPU, TP1: MiB")
    for column in (
        "engine",
        "way in",
        "mode",
        "receive buffer",
        "peak",
        "over it",
        "peak / weights",
    ):
        table.add_column(column, justify="right")
    for case in CASES:
        with case.server(served, folder / "peaks.log", sglang_python) as server:
            for mode, peak, buffer in _measured(case, server, model):
                way = "live parameters" if case.direct else "loader"
                over, share = _mib(peak - buffer), f"{peak / weights:.2%}"
                table.add_row(case.engine, way, mode, _mib(buffer), _mib(peak), over, share)
    return table


def _measured(case: _Case, server: EngineServer, model: Any) -> Iterator[tuple[Mode, int, int]]:
    """Of each mode: the highest peak of its updates, and the receive buffer, in bytes."""
    with WeightSender.from_hf(
        model.named_parameters(), engines=server.url, token=TOKEN, config=model.config
    ) as sender:
        version = 0
        for mode in case.modes:
            reports = []
            for _ in range(1 + UPDATES):
                version += 1
                reports.append(sender.update(version, mode=mode))
            # The first of a mode makes its buffer, or sees that live parameters may be landed in.
            counted = reports[1:]
            highest = max(_update(report).peak_extra_bytes for report in counted)
            yield mode, highest, max(_buffer(report) for report in counted)


def _buffer(report: SenderReport) -> int:
    """Size that the receive buffer has by its configuration.

    The plan says it of an update in place by way of the loader: the largest module, a quarter
    more, and scratch. A staged one has room for all modules and the same scratch; what lands in
    live parameters has none.
    """
    (plan,), update = report.plans.values(), _update(report)
    if update.direct_bytes == update.bytes_needed:
        return 0
    rank = plan.ranks[0]
    if update.mode == "in_place":
        return rank.arena_bytes
    return plan.bytes_needed + rank.arena_bytes - rank.largest_step_bytes * 5 // 4


def _update(report: SenderReport) -> UpdateReport:
    (update,) = report.engines.values()
    return update


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.1f}"
