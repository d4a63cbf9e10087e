"""Ranks of a real engine, played one after the other in this process, and what they load.

An engine rank is its model class, built under the engine's own configuration for a parallel size
and a rank that are only said: nothing is sent between ranks while a model is built or loaded. A
played rank makes the copies that a real worker of that rank makes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from engine_plugins.weights.coverage import LoaderRules, engine_steps
from engine_plugins.weights.destination import DestinationMap, destination_map
from engine_plugins.weights.loader_trace import LoaderTrace, LogicalTensor
from engine_plugins.weights.needed import needed_boxes
from engine_plugins.weights.placement import SourceBox
from tests.support.fetched import fetched

__all__ = [
    "REFUSED",
    "PlayedEngine",
    "PlayedRank",
    "land",
    "loaded",
    "logical",
    "played_engine",
    "same_bits",
    "uneven_sizes",
]

Tensors = Mapping[str, torch.Tensor]

REFUSED = "refused by the engine"
"""Under this property a test says what an engine's own constructor refuses."""

_SHARED = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
)
_REPLICATED = ("num_key_value_heads",)


class PlayedRank(Protocol):
    """One rank, for as long as the context that gave it lasts."""

    @property
    def rules(self) -> LoaderRules:
        """What the engine's installer says of its loader."""
        ...

    def trace(self, tensors: Sequence[LogicalTensor]) -> LoaderTrace:
        """The installer's trace of the loader."""
        ...

    def model(self) -> nn.Module:
        """The engine's model of this rank, in memory and not loaded."""
        ...


class PlayedEngine(Protocol):
    """An engine whose ranks can be played here, one at a time."""

    kind: str

    def rank(
        self, model: Path, *, tp_size: int, tp_rank: int, expert_parallel: bool = False
    ) -> AbstractContextManager[PlayedRank]:
        """Play a rank of an engine that serves the model of a folder with a config.json.

        Raises:
            Exception: whatever the engine refuses the model or the size with.
        """
        ...


@contextmanager
def played_engine() -> Iterator[PlayedEngine]:
    """The engine of this environment; its process-wide groups go with the context."""
    kind = next(kind for kind in ("vllm", "sglang") if find_spec(kind) is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what this machine lacks, one for each of its modules
        with import_module(f"tests.support.loader_maps_{kind}").engine() as engine:
            yield engine


def logical(tensors: Tensors) -> list[LogicalTensor]:
    """What a trace is told of tensors."""
    return [
        LogicalTensor(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)
        for name, tensor in tensors.items()
    ]


def loaded(model: nn.Module, tensors: Tensors) -> dict[str, torch.Tensor]:
    """A copy of the parameters after the engine's loader, on top of what no loader gives."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan if parameter.is_floating_point() else -1)
        load_through(model, tensors)
        return {name: parameter.clone() for name, parameter in model.named_parameters()}


def load_through(model: nn.Module, tensors: Tensors) -> None:
    """Hand tensors to the model's own loader."""
    with torch.no_grad():
        model.load_weights(iter(tensors.items()))  # type: ignore[operator]


def land(
    rank: PlayedRank, model: nn.Module, offered: Sequence[Sequence[SourceBox]]
) -> DestinationMap:
    """Update a rank's parameters from what trainer ranks offer, as an engine rank of ours does.

    What the destination map places is fetched as far as it is needed, and put in its place; the
    rest is fetched whole and goes through the loader.
    """
    whole = {box.name: box for boxes in offered for box in boxes}
    tensors = [
        LogicalTensor(name=name, shape=box.global_shape, dtype=box.data.dtype)
        for name, box in whole.items()
    ]
    trace = rank.trace(tensors)
    _, unused = engine_steps(trace, tensors, rank.rules)
    assert unused == []
    places = destination_map(trace, tensors)
    got = fetched(offered, needed_boxes(trace, tensors))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for box in (box for boxes in places.boxes.values() for box in boxes):
            of = tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))
            target = parameters[box.parameter].as_strided(box.shape, box.strides, box.offset)
            target.copy_(got[box.tensor][of])
    modules = trace.modules()
    load_through(model, {name: got[name] for module in places.reasons for name in modules[module]})
    return places


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit; NaNs count as what they are made of."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (one, other)))


def uneven_sizes(config: Mapping[str, Any], tp_size: int) -> list[str]:
    """Sizes of a HF config that ranks of an engine cannot share evenly, or replicate."""
    counts = {key: config.get(key) for key in _SHARED}
    return [
        f"{key} = {count}"
        for key, count in counts.items()
        if count and count % tp_size and not (key in _REPLICATED and tp_size % count == 0)
    ]
