"""What an engine's own weight loader does, recorded by feeding it placeholders.

The loader is run once with tensors that have a shape and a dtype but no storage (the meta
device). The copies that it makes into the engine's parameters are recorded instead of executed.
So every model that the engine can load is covered, and no table of ours can be out of date.
From the record follow: which HF tensors reach which parameter, whether every parameter is
covered, which names reach nothing, and where a dtype would be cast.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from engine_plugins.errors import UnsupportedError, WeightMismatchError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.alike_layers import AlikeLayers
from engine_plugins.weights.loader.engine_tensors import (
    ModelParameters,
    saved_buffers,
    tensors_beside,
)
from engine_plugins.weights.loader.loader_threads import pools_done_here
from engine_plugins.weights.loader.loader_watch import (
    SourceView,
    TracedCopy,
    WatchedCopies,
    following,
    intercepting,
)
from engine_plugins.weights.loader.loading_in_parts import refuse_unless_in_parts
from engine_plugins.weights.loader.meta_parameters import parameters_on_meta
from engine_plugins.weights.loader.missing_buffers import missing_buffers
from engine_plugins.weights.loader.needed import needed_boxes
from engine_plugins.weights.loader.short_reasons import short_reason
from engine_plugins.weights.loader.strided_cover import Place, distinct_numel
from engine_plugins.weights.loader.strided_reads import read_alike, room_strides

__all__ = [
    "Filling",
    "LoadWeights",
    "LoaderTrace",
    "ParameterLayout",
    "SourceView",
    "TracedCopy",
    "trace_loader",
]

LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], object]


class ParameterLayout(NamedTuple):
    """How a parameter lies in its storage while it is loaded; offset and strides in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> ParameterLayout:
        """The layout of a tensor as it is."""
        return cls(
            tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), tensor.dtype
        )


class Filling(NamedTuple):
    """What copies fill of a parameter, in elements."""

    covered: int
    """Elements that any copy fills."""
    copied: int
    """Elements of all copies together: more where two overlap."""


@dataclass(frozen=True, kw_only=True)
class LoaderTrace:
    """Every copy of one run of the loader, on one engine rank."""

    copies: tuple[TracedCopy, ...]
    parameter_numel: Mapping[str, int]
    """Elements that a checkpoint has to fill, for every parameter of this rank, and for every
    buffer that the loader fills."""
    layouts: Mapping[str, ParameterLayout] = field(default_factory=dict)
    """What the loader writes to, by parameter or buffer."""
    strided: frozenset[str] = frozenset()
    """Tensors that it reads alike where what it needs of them lies with strides of its own."""
    whole: bool = False
    """Whether the loader has to be given everything in one call."""

    def sources(self) -> set[str]:
        """HF names that reached a parameter of this rank."""
        return {name for copy in self.copies for name in copy.sources}

    def filling(self) -> dict[str, Filling]:
        """How full the copies make each parameter; equal copies count once."""
        places: dict[str, dict[Place, None]] = {name: {} for name in self.parameter_numel}
        for copy in self.copies:
            if copy.parameter in places:  # or it is derived, and no checkpoint holds it
                places[copy.parameter][Place(copy.offset, copy.shape, copy.strides)] = None
        known: dict[tuple[Place, ...], Filling] = {}  # most layers are filled alike
        return {name: _filling(tuple(each), known) for name, each in places.items()}

    def covered_numel(self) -> dict[str, int]:
        """Elements of each parameter that the copies fill, each element once."""
        return {name: filling.covered for name, filling in self.filling().items()}

    def fills_exactly(self) -> bool:
        """Whether the copies fill every element of every parameter, and none by two copies."""
        wanted = {name: Filling(numel, numel) for name, numel in self.parameter_numel.items()}
        return self.filling() == wanted

    def modules(self) -> dict[str, list[str]]:
        """HF names by the engine module whose parameters they fill, in the loader's order."""
        modules: dict[str, dict[str, None]] = {}
        for copy in self.copies:
            module = copy.parameter.rpartition(".")[0]
            modules.setdefault(module, {}).update(dict.fromkeys(copy.sources))
        return {module: list(names) for module, names in modules.items()}


def trace_loader(
    parameters: Mapping[str, torch.Tensor],
    load_weights: LoadWeights,
    tensors: Sequence[LogicalTensor],
    *,
    may_load_whole: bool = False,
) -> LoaderTrace:
    """Record what `load_weights` does with `tensors`.

    Of layers that differ by their number alone three are shown to it, and what it does with the
    others follows, if it treats the three alike. What it does otherwise with a layer in between is
    not seen here; the first update compares values, and such a module is not landed in directly
    (`landing.py`).

    Args:
        parameters: the engine model's parameters by name, on the meta device, with the
            engine's own loaders attached. Aliases may appear once. Of `ModelParameters` the
            model's buffers and tensor attributes are watched as well, and the loader is seen to
            load one module at a time.
        load_weights: the model's own loader.
        tensors: the tensors that would be fed, in the order in which they would be fed.
        may_load_whole: whether an engine can load a whole model at once, where its loader does
            not load one module at a time.

    Raises:
        WeightMismatchError: the loader refused a tensor; the text names it.
        UnsupportedError: see `refuse_unless_in_parts`.
    """
    model = parameters.model if isinstance(parameters, ModelParameters) else None
    loader = _Loader(parameters, load_weights, model)
    alike = AlikeLayers(
        [(tensor.name, (tensor.shape, tensor.dtype)) for tensor in tensors],
        {
            name: (ParameterLayout.of(each), _loadable_numel(each))
            for name, each in {**loader.beside(), **parameters}.items()
        },
    )
    for attempt in (_samples_followed, _all_intercepted):
        try:
            copies = attempt(loader, tensors, alike)
        except WeightMismatchError:
            continue  # the whole run says which tensor it was
        if copies is not None and (trace := loader.trace(copies)).fills_exactly():
            break
    else:
        trace = loader.trace(loader.run(tensors, following).copies)

    def part(names: Container[str]) -> WatchedCopies:
        return loader.run([tensor for tensor in tensors if tensor.name in names], following)

    trace = replace(trace, strided=_strided(loader, trace, tensors, alike))
    if model is None:
        return trace
    try:
        refuse_unless_in_parts(trace.copies, trace.modules(), part)
    except UnsupportedError:
        if not may_load_whole:
            raise
        trace = replace(trace, whole=True)
    return loader.with_missing(trace, saved_buffers(model), tensors if trace.whole else ())


def _strided(
    loader: _Loader, trace: LoaderTrace, tensors: Sequence[LogicalTensor], alike: AlikeLayers
) -> frozenset[str]:
    """Show the loader a few layers once more, as they would lie in a small receive buffer."""
    strides = room_strides(tensors, needed_boxes(trace, tensors))
    if not strides:
        return frozenset()
    few = [tensors[place] for place in alike.samples]
    try:
        shown = loader.run(few, following).copies
    except WeightMismatchError:  # it wants all of them, or none
        return frozenset()
    return read_alike(strides, few, shown, lambda tried: loader.run(few, following, tried).copies)


def _samples_followed(
    loader: _Loader, tensors: Sequence[LogicalTensor], alike: AlikeLayers
) -> Sequence[TracedCopy] | None:
    """Follow the loader through three layers of each kind, and write the others from those.

    None where all layers would have to be shown, or the three are not treated alike.
    """
    if len(alike.samples) == len(tensors):
        return None
    return alike.completed(loader.run([tensors[p] for p in alike.samples], following).copies)


def _all_intercepted(
    loader: _Loader, tensors: Sequence[LogicalTensor], alike: AlikeLayers
) -> Sequence[TracedCopy] | None:
    """Follow the loader through one layer of each kind, then through all by its copies alone.

    None where that does not show everything: the loader computes, or copies in a way of its own.
    """
    if not loader.run([tensors[place] for place in alike.first], following).as_published:
        return None
    seen = loader.run(tensors, intercepting)
    return seen.copies if seen.as_published else None


class _Loader:
    """The loader, and what it may write to."""

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        load_weights: LoadWeights,
        model: nn.Module | None,
    ) -> None:
        self._given = parameters
        self._parameters = dict(parameters)
        self._load_weights = load_weights
        self._model = model
        self._beside: dict[str, torch.Tensor] = {}

    def beside(self) -> dict[str, torch.Tensor]:
        """The tensors beside the parameters, as they are now."""
        return {} if self._model is None else tensors_beside(self._model)

    def run(
        self,
        tensors: Sequence[LogicalTensor],
        watch: Callable[[WatchedCopies], AbstractContextManager[object]],
        strides: Mapping[str, tuple[int, ...]] | None = None,
    ) -> WatchedCopies:
        """Run the loader once, and say what it did.

        Args:
            tensors: what it is shown.
            watch: how it is looked at.
            strides: of tensors that are not contiguous, in elements.
        """
        self._beside = self.beside()
        copies = WatchedCopies(self._parameters, self._beside, self._parameters_now)
        making = nullcontext() if self._model is None else parameters_on_meta()
        feed = _Feed(tensors, copies, strides or {})
        try:
            with torch.no_grad(), making, pools_done_here(), watch(copies):
                self._load_weights(iter(feed))
        except Exception as error:  # the engine's loader raises whatever it likes
            raise _refused(feed.current, error) from error
        copies.note_replaced(self.beside())
        if isinstance(self._given, ModelParameters):
            made_anew = self._given.made_anew
            copies.copies = [each for each in copies.copies if each.parameter not in made_anew]
        self._parameters |= self._parameters_now()
        return copies

    def _parameters_now(self) -> dict[str, torch.Tensor]:
        return {} if self._model is None else dict(self._model.named_parameters())

    def trace(
        self,
        copies: Sequence[TracedCopy],
        missing: AbstractSet[str] = frozenset(),
        strided: frozenset[str] = frozenset(),
    ) -> LoaderTrace:
        """The trace of copies: a buffer belongs to it if a tensor is copied there as published."""
        wanted = missing | {copy.parameter for copy in copies if copy.read is not None}
        held = {**self._parameters}
        held |= {name: each for name, each in self._beside.items() if name in wanted}
        return LoaderTrace(
            copies=tuple(copies),
            parameter_numel={name: _loadable_numel(tensor) for name, tensor in held.items()},
            layouts={name: ParameterLayout.of(tensor) for name, tensor in held.items()},
            strided=strided,
        )

    def with_missing(
        self, trace: LoaderTrace, saved: AbstractSet[str], always: Sequence[LogicalTensor]
    ) -> LoaderTrace:
        """The trace with the buffers that the tensors leave out and a checkpoint would fill.

        Args:
            trace: of what was offered.
            saved: buffers that may be saved.
            always: what the loader has to be given beside any tensor.
        """
        left = {
            name: self._beside[name]
            for name in sorted(saved - trace.parameter_numel.keys())
            if name in self._beside
        }
        filled_with = partial(self._filled_with, always)
        missing = missing_buffers(left, trace.copies, filled_with)
        if not missing:
            return trace
        return replace(self.trace(trace.copies, missing, trace.strided), whole=trace.whole)

    def _filled_with(
        self, always: Sequence[LogicalTensor], name: str, like: torch.Tensor
    ) -> set[str]:
        tensor = LogicalTensor(name=name, shape=tuple(like.shape), dtype=like.dtype)
        others = [each for each in always if each.name != name]
        try:
            seen = self.run([*others, tensor], following)
        except WeightMismatchError:  # it knows no such name
            return set()
        return {copy.parameter for copy in seen.copies if copy.sources}


def _filling(places: tuple[Place, ...], known: dict[tuple[Place, ...], Filling]) -> Filling:
    if places not in known:
        copied = sum(prod(place.shape) for place in places)
        known[places] = Filling(distinct_numel(places), copied)
    return known[places]


def _loadable_numel(parameter: torch.Tensor) -> int:
    """Elements that a checkpoint fills; engines note padding that it does not."""
    return int(getattr(parameter, "weight_loader_numel", parameter.numel()))


def _refused(current: LogicalTensor | None, error: Exception) -> WeightMismatchError:
    reason = short_reason(error)
    if current is None:
        return WeightMismatchError(f"the engine's loader failed before the first tensor: {reason}")
    return WeightMismatchError(
        f"{current.name}: the engine's loader refuses shape {current.shape} of "
        f"{str(current.dtype).removeprefix('torch.')} ({reason})",
        remedy="publish the tensors of the model that this engine was started with",
    )


class _Feed:
    """Hands placeholders to the loader and remembers which one it is looking at.

    They are made beforehand: under a watch each would cost as much as a copy.
    """

    def __init__(
        self,
        tensors: Sequence[LogicalTensor],
        copies: WatchedCopies,
        strides: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.current: LogicalTensor | None = None
        self._offers = [(tensor, _placeholder(tensor, strides)) for tensor in tensors]
        for tensor, placeholder in self._offers:
            copies.add_source(tensor.name, placeholder)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for tensor, placeholder in self._offers:
            self.current = tensor
            yield tensor.name, placeholder


def _placeholder(tensor: LogicalTensor, strides: Mapping[str, tuple[int, ...]]) -> torch.Tensor:
    own = strides.get(tensor.name)
    if own is None:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_strided(tensor.shape, own, dtype=tensor.dtype, device="meta")
