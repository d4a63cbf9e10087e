"""How long a staged update holds SGLang, beside a plain copy of the same bytes.

Everything is on that an operator may turn on (the prefill gate, sleep), and a request is in flight,
whose KV is computed anew or kept. A pause cannot be shorter than the copy of the weights from the
receive buffer into the live parameters; what it takes beyond that is ours and the engine's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from engine_plugins import WeightSender
from engine_plugins.weights.contract.report import UpdateReport
from tests.support.engine_server import TOKEN, EngineServer
from tests.support.sglang_server import sglang_server
from tests.support.sized_models import sized_qwen3
from tests.support.streams import Stream

__all__ = ["pause_beside_copy"]

EVERYTHING = {"ENGINE_PLUGINS_PREFILL_GATE": "enforce", "ENGINE_PLUGINS_SLEEP": "true"}
TOKENS = 40
WARMING = 2
"""Updates before any is timed: the first goes through the loader, the second makes no buffer."""


class _Pair(NamedTuple):
    in_flight_kv: str
    report: UpdateReport
    copy_s: float


def pause_beside_copy(folder: Path, sglang_python: Path, *, pairs: int) -> Table:
    """Milliseconds, medians; the ratio is the median of those within a pair."""
    model = sized_qwen3()
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    table = Table(title=f"pause of a staged update of {nbytes / 1e6:.0f} MB, SGLang, beside a copy")
    for column in ("KV", "pairs", "copy", "paused", "pause", "install", "flush", "paused / copy"):
        table.add_column(column, justify="left" if column == "KV" else "right")
    measured = list(_pairs(model, folder, sglang_python, pairs))
    for kv in ("recompute", "keep"):
        rows = [each for each in measured if each.in_flight_kv == kv]
        phases = [each.report.phases for each in rows]
        table.add_row(
            kv,
            str(len(rows)),
            _ms(each.copy_s for each in rows),
            _ms(each.report.paused_s for each in rows),
            _ms(each.pause_s for each in phases),
            _ms(each.install_s for each in phases),
            _ms(each.flush_s for each in phases),
            f"{statistics.median(each.report.paused_s / each.copy_s for each in rows):.2f}",
        )
    return table


def _pairs(model: Any, folder: Path, python: Path, pairs: int) -> Iterator[_Pair]:
    served = folder / "paused"
    model.save_pretrained(served)
    source = [parameter.detach() for parameter in model.parameters()]
    target = [torch.empty_like(tensor).zero_() for tensor in source]
    with (
        sglang_server(
            served,
            folder / "paused.log",
            arguments=["--engine-plugins-enable"],
            environment={
                **EVERYTHING,
                "ENGINE_PLUGINS_PREFILL_CALIBRATION_DIR": str(folder / "paused-calibration"),
            },
            python=python,
        ) as server,
        WeightSender.from_hf(
            model.named_parameters(), engines=server.url, token=TOKEN, config=model.config
        ) as sender,
    ):
        for version in range(1, 1 + WARMING + 2 * pairs):
            kv = ("recompute", "keep")[version % 2]
            report = _updated(server, sender, version, kv)
            pair = _Pair(kv, report, _copied_s(source, target))
            if version > WARMING:
                yield pair


def _updated(server: EngineServer, sender: WeightSender, version: int, kv: Any) -> UpdateReport:
    """A staged update while a request is answered."""
    stream = Stream(server, [5, 6, 7, 8, 9], TOKENS)
    stream.wait_for(5)
    (report,) = sender.update(version, mode="staged", in_flight_kv=kv).engines.values()
    stream.result()
    return report


def _copied_s(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> float:
    """Seconds of a copy by one thread, which a rank of the server has as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.perf_counter()
        for from_, to in zip(source, target, strict=True):
            to.copy_(from_)
        return time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)


def _ms(seconds: Iterable[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.1f}"
