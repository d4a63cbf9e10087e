"""What an update costs the trainer that sends it: memory at its peak, and how long it waits.

The peak is this process's, from the kernel. Blocked is the whole of `update`: the trainer's tensors
must stay as they are until it returns. One live server at a time, the trainer is this process.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from engine_plugins import WeightSender
from engine_plugins.weights.hardware.peak_memory import PeakMemory
from tests.benchmarks.clock import Clock, Cost
from tests.support.engine_server import TOKEN
from tests.support.sized_models import sized_qwen3
from tests.support.vllm_server import vllm_server

__all__ = ["trainer_cost"]

UPDATES = 5
CASES = [("read where they lie", "float32"), ("cast for the engine", "bfloat16")]
"""How the trainer's float32 tensors are offered, and the dtype that the engine serves in."""


def trainer_cost(folder: Path) -> Table:
    """The table; medians of updates after the first, which registers and allocates."""
    model = sized_qwen3()
    served = folder / "trainer-cost"
    model.save_pretrained(served)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    mib = weights / (1 << 20)
    table = Table(title=f"what an update of {mib:.0f} MiB in float32 costs its trainer, CPU, vLLM")
    for column in ("tensors", "update", "blocked s", "CPU s", "peak MiB", "peak / weights"):
        table.add_column(column, justify="right")
    for way, dtype in CASES:
        arguments = ["--dtype", dtype]
        with vllm_server(served, folder / "trainer-cost.log", arguments=arguments) as server:
            first, later, peak_first, peak_later = _measured(server.url, model)
        for name, cost, peak in (("first", first, peak_first), ("later", later, peak_later)):
            table.add_row(
                way,
                name,
                f"{cost.seconds:.2f}",
                f"{cost.cpu_s:.2f}",
                f"{peak / (1 << 20):.1f}",
                f"{peak / weights:.1%}",
            )
    return table


def _measured(url: str, model: Any) -> tuple[Cost, Cost, int, int]:
    """Cost of the first update with its connect, of later ones, and the peaks of both."""
    clock, memory = Clock(), PeakMemory.start(already_held=0)
    with WeightSender.from_hf(model, engines=url, token=TOKEN) as sender:
        sender.update(1)
        first, peak_first = clock.cost(), memory.peak_extra_bytes()
        costs: list[Cost] = []
        peaks: list[int] = []
        for version in range(2, 2 + UPDATES):
            clock, memory = Clock(), PeakMemory.start(already_held=0)
            sender.update(version)
            costs.append(clock.cost())
            peaks.append(memory.peak_extra_bytes())
    later = Cost(*map(statistics.median, zip(*costs, strict=True)))
    return first, later, peak_first, max(peaks)
