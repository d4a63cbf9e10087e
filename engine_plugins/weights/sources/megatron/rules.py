"""What is known of one native Megatron parameter: how it is cut and which HF tensors it holds.

Plain data; `megatron/tables.py` has the rules of the families known here, `megatron/registry.py`
takes those of others. Every cut is the one that megatron-core 0.16.1 makes by default; a module's
class may say another (`megatron/classes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine_plugins.weights.sources.megatron.layout import Role, Rows

__all__ = ["IGNORED", "Rule", "Rules"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one native parameter is laid out and which HF tensors it holds.

    Attributes:
        hf: names of the HF tensors, in the order of the fused rows. `{layer}`, `{mtp}` and
            `{expert}` stand for the numbers in the native name, counted over the model.
        role: the cut, and the group that it goes over; None: as the class of its module says.
        sizes: each HF tensor's shape, in expressions of `sizes.py`; None: as the shards say.
        rows: the order of the rows.
        segments: with `Rows.SEGMENTS`, the rows of each stretch, as expressions; with
            `Rows.DELTA_NET`, key heads, rows of each, value heads, rows of each.
        expert: whether it is a parameter of one expert.
        number: the expert's number over the model, once a parameter's rule is found.
        plus: what HF's values are above Megatron's.
    """

    hf: tuple[str, ...]
    role: Role | None = None
    sizes: tuple[tuple[str, ...], ...] | None = None
    rows: Rows = Rows.PLAIN
    segments: tuple[str, ...] = ()
    expert: bool = False
    number: int = 0
    plus: int = 0


Rules = Mapping[str, Rule]
"""Native name -> rule. In a native name `{layer}`, `{mtp}` and `{expert}` stand for numbers."""

IGNORED = Rule(role=Role.COLUMN, hf=())
"""A copy of something that another parameter publishes."""
