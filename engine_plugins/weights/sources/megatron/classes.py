"""How a Megatron module cuts its parameters, from its class.

The table is Megatron-Bridge 0.3.1's registry of module types; where Bridge is installed, what is
registered there (by users as well) is asked too. A class in neither is known by what its name
says, and one that says nothing is an error: a parameter is never replicated by default.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import nn

from engine_plugins.errors import SourceError
from engine_plugins.weights.sources.megatron.layout import Cut

__all__ = ["class_name", "cut_of"]

_TABLE: Mapping[str, Cut] = {
    "ColumnParallelLinear": Cut.COLUMN,
    "DotProductAttention": Cut.COLUMN,  # its attention sinks
    "Gemma2OutputLayer": Cut.COLUMN,
    "LinearCrossEntropyModule": Cut.COLUMN,
    "TEColumnParallelGroupedLinear": Cut.COLUMN,
    "TEColumnParallelLinear": Cut.COLUMN,
    "TEDotProductAttention": Cut.COLUMN,
    "TELayerNormColumnParallelLinear": Cut.COLUMN,
    "VocabParallelEmbedding": Cut.COLUMN,
    "RowParallelLinear": Cut.ROW,
    "TERowParallelGroupedLinear": Cut.ROW,
    "TERowParallelLinear": Cut.ROW,
    "TERowParallelLinearLayerNorm": Cut.ROW,
    "FusedLayerNorm": Cut.REPLICATED,
    "L2Norm": Cut.REPLICATED,
    "LayerNorm": Cut.REPLICATED,
    "RMSNorm": Cut.REPLICATED,
    "TELinear": Cut.REPLICATED,
    "TENorm": Cut.REPLICATED,
    "TopKRouter": Cut.REPLICATED,
    "WrappedTorchNorm": Cut.REPLICATED,
}
_BY_MODE = {"column": "TEColumnParallelLinear", "row": "TERowParallelLinear"}
"""Transformer Engine's plain linear by its `parallel_mode`."""

_CONTAINERS = frozenset(
    {
        "Conv1d",
        "ExtendedRMSNorm",
        "GatedDeltaNet",
        "GroupedMLP",
        "MambaMixer",
        "SharedExpertMLP",
    }
)
"""Classes that hold parameters of several kinds themselves, or are cut by who holds them: only the
name can tell."""

_SUBSTRINGS = (
    ("ColumnParallel", Cut.COLUMN),
    ("VocabParallel", Cut.COLUMN),
    ("RowParallel", Cut.ROW),
    ("Norm", Cut.REPLICATED),
    ("Router", Cut.REPLICATED),
)
_BRIDGE = "megatron.bridge.models.conversion.param_mapping"


def class_name(module: nn.Module) -> str:
    """The class that says how a module cuts: its own, or the nearest ancestor in the table."""
    for kind in type(module).__mro__:
        if kind.__name__ == "TELinear":
            return _BY_MODE.get(getattr(module, "parallel_mode", None) or "", "TELinear")
        if kind.__name__ in _TABLE or kind.__name__ in _CONTAINERS:
            return kind.__name__
    return type(module).__name__


def cut_of(kind: str, native: str, overrides: Mapping[str, str]) -> Cut | None:
    """How a module of this class cuts one of its parameters.

    Args:
        kind: name of the module's class.
        native: the name of one of its parameters.
        overrides: class name -> "column", "row" or "replicated", which wins over all tables.

    Returns:
        None for a class of which the parameter's name alone can tell.

    Raises:
        SourceError: a class of which nothing is known, or an override that is none of the three.
    """
    if kind in _CONTAINERS and kind not in overrides:
        return None
    cut = _overridden(kind, overrides) or _cut_of_class(kind)
    if cut is None:
        raise SourceError(
            f"module class {kind} is unknown, so how it cuts {native} is too",
            remedy=f"say it with class_cuts={{{kind!r}: 'column' | 'row' | 'replicated'}}",
        )
    # A fused norm is never cut, nor is what a row-parallel linear adds after its sum.
    leaf = native.rpartition(".")[2].rstrip("0123456789")
    if leaf.startswith("layer_norm_") or (leaf == "bias" and cut is Cut.ROW):
        return Cut.REPLICATED
    return cut


def _overridden(kind: str, overrides: Mapping[str, str]) -> Cut | None:
    said = overrides.get(kind)
    try:
        return None if said is None else Cut(said)
    except ValueError:
        raise SourceError(
            f"class_cuts says {said!r} of {kind}",
            remedy="say 'column', 'row' or 'replicated'",
        ) from None


def _cut_of_class(kind: str) -> Cut | None:
    known = _TABLE.get(kind) or _bridge_cut(kind)
    return known or next((cut for part, cut in _SUBSTRINGS if part in kind), None)


def _bridge_cut(kind: str) -> Cut | None:
    """What Megatron-Bridge says of a class, if the trainer uses it."""
    mapping = getattr(sys.modules.get(_BRIDGE), "AutoMapping", None)
    registry = getattr(mapping, "_MODULE_TYPE_REGISTRY", {})
    return next((Cut(said) for said, kinds in registry.items() if kind in kinds), None)
