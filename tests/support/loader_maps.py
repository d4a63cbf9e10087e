"""Ranks of a real engine, played one after the other in this process, and what they load.

An engine rank is its model class, built under the engine's own configuration for a parallel size
and a rank that are only said: nothing is sent between ranks while a model is built or loaded. A
played rank makes the copies that a real worker of that rank makes.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
import torch
from torch import nn

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.contract.report import RankReport
from engine_plugins.weights.loader.coverage import LoaderRules
from engine_plugins.weights.loader.loader_trace import LoaderTrace
from engine_plugins.weights.loader.weight_installer import WeightInstaller
from engine_plugins.weights.planning import packing
from engine_plugins.weights.receiving.receiver import WeightReceiver
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.source_ranks import SourceRank, offered_boxes

__all__ = [
    "REFUSED",
    "WHOLE_ROWS",
    "Landed",
    "PlayedEngine",
    "PlayedRank",
    "land",
    "loaded",
    "logical",
    "played_engine",
    "receiving",
    "same_bits",
    "uneven_sizes",
    "update",
]

Tensors = Mapping[str, torch.Tensor]

REFUSED = "refused by the engine"
"""Under this property a test says what an engine's own constructor refuses."""

WHOLE_ROWS = "bytes needed and moved"
"""Under this property a test says both where the plan fetches whole rows."""

_SHARED = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
)
_REPLICATED = ("num_key_value_heads",)
_serial = itertools.count()


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

    def installer(self, model: nn.Module) -> WeightInstaller:
        """The engine's own installer over a model, which serves from here on."""
        ...


class PlayedEngine(Protocol):
    """An engine whose ranks can be played here, one at a time."""

    kind: str

    def rank(
        self,
        model: Path,
        *,
        tp_size: int,
        tp_rank: int,
        expert_parallel: bool = False,
        draft: Path | None = None,
        dtype: str = "float32",
    ) -> AbstractContextManager[PlayedRank]:
        """Play a rank of an engine that serves the model of a folder with a config.json.

        With `draft`, the rank is that of the model that drafts for it: the model's own prediction
        layers if it is the same folder, an EAGLE-3 head otherwise.

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


class PlayedInstaller:
    """A rank's installer over a model whose parameters serve as they are loaded.

    It is the engine's own as far as tracing and names go; the loader is the model's, with nothing
    packed afterwards.
    """

    def __init__(self, rank: PlayedRank, model: nn.Module, spared: Container[str] = ()) -> None:
        self.trace = rank.trace
        self.model_dtype = rank.rules.model_dtype
        self._rules = rank.rules
        self._spared = spared
        self._model = model
        self.loaded: list[str] = []

    def may_go_unused(self, name: str) -> bool:
        return name in self._spared or self._rules.may_go_unused(name)

    def live_parameters(self) -> Tensors:
        return {name: each.detach() for name, each in self._model.named_parameters()}

    def begin(self) -> None:
        self.loaded = []

    def install(self, modules: Sequence[str], tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.loaded += modules
        load_through(self._model, dict(tensors))

    def landed(self, modules: Sequence[str]) -> None:
        pass

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        raise AssertionError("nothing fails here")


class Landed(NamedTuple):
    """What two updates of a rank say."""

    row_by_row: RankReport
    """The first, through the loader, with no row fetched whole for its parts."""
    filled_bytes: int
    """Of the rank's parameters, those whose values came from the trainer."""
    report: RankReport
    """The second, into live parameters, by the rule of short rows."""
    through_the_loader: list[str]
    """Modules that did not land directly even then."""


def land(
    rank: PlayedRank,
    model: nn.Module,
    offered: Sequence[Sequence[SourceBox]],
    *,
    spared: Container[str] = (),
) -> Landed:
    """Update a rank twice from what trainer ranks offer: other values first, then their own.

    The first update goes through the loader and is compared with what the map says; the second
    lands in the parameters, except in modules that the map or the comparison kept out. Names that
    are `spared` may reach nothing.
    """
    boxes = [box for each in offered for box in each]
    values = [box.data.clone() for box in boxes]
    installer = PlayedInstaller(rank, model, spared)
    ranks = offered_boxes(*(each for each in offered if each))
    with ranks as trainers, receiving(installer) as receiver:
        for box in boxes:
            box.data.fill_(13)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "SHORT_RUN_BYTES", 0)
            row_by_row = update(receiver, trainers)
        filled = sum(int((each == 13).sum()) * each.itemsize for each in model.parameters())
        for box, value in zip(boxes, values, strict=True):
            box.data.copy_(value)
        report = update(receiver, trainers)
    return Landed(row_by_row, filled, report, installer.loaded)


@contextmanager
def receiving(installer: WeightInstaller, *, direct: bool = True) -> Iterator[WeightReceiver]:
    """A receiver over the in-memory wire."""
    receiver = WeightReceiver(
        installer,
        lambda: InMemoryTransport(f"engine-{next(_serial)}"),
        tp_rank=0,
        stall_timeout_s=30.0,
        direct_landing=direct,
    )
    try:
        yield receiver
    finally:
        receiver.close()


def update(receiver: WeightReceiver, trainers: Sequence[SourceRank]) -> RankReport:
    """Have a receiver take what trainers offer, whole."""
    for trainer in trainers:
        trainer.source.refresh()
    assert receiver.connect("plan", [trainer.manifest for trainer in trainers]).unused == []
    status = receiver.start("plan", staged=False, timeout_s=60.0)
    while status.steps_installed < status.steps_total:
        status = receiver.advance(budget_s=1.0)
    report = receiver.finish()
    receiver.drop("plan")
    return report


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
