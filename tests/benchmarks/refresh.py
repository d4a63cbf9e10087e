"""What a trainer's process computes before an update of which nothing has moved, beside the first.

`described` is the look that finds out everything, as every update did once; `unchanged` is the one
that finds everything where it was. Processor time of this process, medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import count

import torch
from rich.table import Table
from torch import nn

from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.sources.forms.cast import Cast, sent_dtypes
from engine_plugins.weights.sources.forms.form_source import FormSource
from engine_plugins.weights.sources.hf_offer import HfOffer
from engine_plugins.weights.sources.megatron.offer import MegatronOffer
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.qwen3_30b import CONFIG, NARROW, rank_of

__all__ = ["refresh"]

TENSORS = 18_867
"""Of Qwen3-30B-A3B, one for each expert and projection."""
_agents = count()


def refresh(*, runs: int) -> Table:
    """The table."""
    table = Table(title=f"a refresh in which nothing moved, {TENSORS:,} tensors: ms of a processor")
    for column in ("source", "boxes", "described", "unchanged", "ratio"):
        table.add_column(column, justify="right")
    for name, (boxes, forget) in _sources().items():
        source = WeightSource(boxes, InMemoryTransport(f"trainer-{next(_agents)}"))
        described, unchanged = [], []
        for _ in range(runs):
            forget()
            described.append(_ms(source.refresh))
            unchanged.append(_ms(source.refresh))
        first, later = statistics.median(described), statistics.median(unchanged)
        table.add_row(
            name, f"{len(boxes()):,}", f"{first:.0f}", f"{later:.1f}", f"{first / later:.0f}"
        )
        source.close()
    return table


def _ms(step: Callable[[], object]) -> float:
    began = time.process_time()
    step()
    return (time.process_time() - began) * 1e3


def _sources() -> dict[str, tuple[Callable[[], Sequence[SourceBox]], Callable[[], None]]]:
    whole = torch.empty(TENSORS, 16, 16)
    named = {
        f"model.layers.{n // 400}.mlp.experts.{n % 400}.gate_proj.weight": whole[n]
        for n in range(TENSORS)
    }
    module = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(TENSORS))
    rank = rank_of({**CONFIG, **NARROW})
    by_name, by_module = HfOffer(named), HfOffer(module)
    sent = FormSource(by_module.boxes, [Cast(sent_dtypes("engine", None))])
    megatron = MegatronOffer(lambda: [rank], rank, {**CONFIG, **NARROW}, None)
    return {
        "named tensors": (by_name.boxes, by_name.forget),
        "a module for each": (by_module.boxes, by_module.forget),
        "the same, as a sender does": (sent.boxes, by_module.forget),
        "a Megatron rank": (megatron.boxes, megatron.forget),
    }
