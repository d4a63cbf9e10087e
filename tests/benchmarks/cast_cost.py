"""What it costs to bring slots up to date: a float32 model cast to bfloat16, beside one `copy_`.

The same elements in one tensor are the least that a cast can take; what is above is the price of
many tensors, and of finding them. Medians of interleaved runs, on one thread: of several, torch
has each wait for the others at every tensor, which on a busy machine is all that there is to see.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.table import Table

from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.sources.forms.cast import Cast, SentDtypes
from engine_plugins.weights.sources.forms.form_source import FormSource
from engine_plugins.weights.sources.remembered import KnownBoxes

__all__ = ["cast_cost"]

ELEMENTS = 96 << 20
COUNTS = (300, 3_000, 18_867)


def cast_cost(*, pairs: int) -> Table:
    """A table by how many tensors the elements are in."""
    table = Table(title=f"{ELEMENTS >> 20} Mi elements, float32 to bfloat16, median of {pairs}")
    for column in ("tensors", "one copy_ ms", "refresh of slots ms", "ratio", "GB/s read"):
        table.add_column(column, justify="right")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for count in COUNTS:
            table.add_row(f"{count:,}", *_measure(count, pairs))
    finally:
        torch.set_num_threads(threads)
    return table


def _measure(count: int, pairs: int) -> list[str]:
    whole = torch.randn(ELEMENTS // count * count)
    target = torch.empty(len(whole), dtype=torch.bfloat16)
    boxes = KnownBoxes(
        SourceBox(name=f"layers.{number}.weight", global_shape=(len(each),), start=(0,), data=each)
        for number, each in enumerate(whole.chunk(count))
    )
    source = FormSource(lambda: boxes, [Cast(SentDtypes(torch.bfloat16, learns=False))])

    def refresh() -> None:
        source.settle(())
        source.boxes()

    def copy() -> None:
        target.copy_(whole)

    ways: dict[str, Callable[[], None]] = {"copy": copy, "slots": refresh}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(pairs + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if run:  # the first makes memory resident
                seconds[name].append(time.perf_counter() - began)
    assert torch.equal(torch.cat([box.data for box in source.boxes()]), target)
    alone, slots = (statistics.median(seconds[name]) for name in ways)
    speed = whole.nbytes / slots / 1e9
    return [f"{alone * 1e3:.1f}", f"{slots * 1e3:.1f}", f"{slots / alone:.2f}", f"{speed:.1f}"]
