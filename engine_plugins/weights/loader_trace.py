"""What an engine's own weight loader does, recorded by feeding it placeholders.

The loader is run once with tensors that have a shape and a dtype but no storage (the meta
device). The copies that it makes into the engine's parameters are recorded instead of executed.
So every model that the engine can load is covered, and no table of ours can be out of date.
From the record follow: which HF tensors reach which parameter, whether every parameter is
covered, which names reach nothing, and where a dtype would be cast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine_plugins.errors import WeightMismatchError

__all__ = [
    "LoadWeights",
    "LoaderTrace",
    "LogicalTensor",
    "ParameterLayout",
    "SourceView",
    "TracedCopy",
    "trace_loader",
]

_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)

LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class LogicalTensor:
    """A whole tensor under its HF checkpoint name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor, in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceView:
    """The elements of one whole tensor that a copy read: a strided view of it, in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedCopy:
    """One copy that the loader made into one of the engine's parameters.

    `sources` has one name for a pure copy, more where the loader computed something first, and
    none where it filled in a constant (the padding of a vocabulary).
    Offsets, strides and shape are in elements and describe the destination.
    """

    sources: tuple[str, ...]
    parameter: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    source_dtype: torch.dtype
    parameter_dtype: torch.dtype
    read: SourceView | None = None
    """What of its one source the copy read; None where values were computed first."""
    pure: bool
    """False where the loader changed the values (a cast, arithmetic) before or in the copy."""


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


@dataclass(frozen=True, kw_only=True)
class LoaderTrace:
    """Every copy of one run of the loader, on one engine rank."""

    copies: tuple[TracedCopy, ...]
    parameter_numel: Mapping[str, int]
    """Elements that a checkpoint has to fill, for every parameter of this rank."""
    layouts: Mapping[str, ParameterLayout] = field(default_factory=dict)
    """What the loader writes to, by parameter."""

    def sources(self) -> set[str]:
        """HF names that reached a parameter of this rank."""
        return {name for copy in self.copies for name in copy.sources}

    def covered_numel(self) -> dict[str, int]:
        """Elements of each parameter that the copies fill; equal copies count once."""
        seen: set[tuple[str, int, tuple[int, ...], tuple[int, ...]]] = set()
        covered = dict.fromkeys(self.parameter_numel, 0)
        for copy in self.copies:
            place = (copy.parameter, copy.offset, copy.shape, copy.strides)
            if place not in seen:
                seen.add(place)
                covered[copy.parameter] += prod(copy.shape)
        return covered

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
) -> LoaderTrace:
    """Record what `load_weights` does with `tensors`.

    Args:
        parameters: the engine model's parameters by name, on the meta device, with the
            engine's own loaders attached. Aliases may appear once.
        load_weights: the model's own loader.
        tensors: the tensors that would be fed, in the order in which they would be fed.

    Raises:
        WeightMismatchError: the loader refused a tensor; the text names it.
    """
    recorder = _CopyRecorder(parameters)
    feed = _Feed(tensors, recorder)
    try:
        with torch.no_grad(), recorder:
            load_weights(iter(feed))
    except Exception as error:  # the engine's loader raises whatever it likes
        raise _refused(feed.current, error) from error
    numel = {name: _loadable_numel(tensor) for name, tensor in parameters.items()}
    layouts = {name: ParameterLayout.of(tensor) for name, tensor in parameters.items()}
    return LoaderTrace(copies=tuple(recorder.copies), parameter_numel=numel, layouts=layouts)


def _loadable_numel(parameter: torch.Tensor) -> int:
    """Elements that a checkpoint fills; engines note padding that it does not."""
    return int(getattr(parameter, "weight_loader_numel", parameter.numel()))


def _refused(current: LogicalTensor | None, error: Exception) -> WeightMismatchError:
    reason = f"{type(error).__name__}: {error}".rstrip(": ")
    if current is None:
        return WeightMismatchError(f"the engine's loader failed before the first tensor: {reason}")
    return WeightMismatchError(
        f"{current.name}: the engine's loader refuses shape {current.shape} of "
        f"{str(current.dtype).removeprefix('torch.')} ({reason})",
        remedy="publish the tensors of the model that this engine was started with",
    )


class _Feed:
    """Hands placeholders to the loader and remembers which one it is looking at."""

    def __init__(self, tensors: Sequence[LogicalTensor], recorder: _CopyRecorder) -> None:
        self.current: LogicalTensor | None = None
        self._tensors = tensors
        self._recorder = recorder

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in self._tensors:
            self.current = tensor
            placeholder = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            self._recorder.add_source(tensor.name, placeholder)
            yield tensor.name, placeholder


class _CopyRecorder(TorchDispatchMode):
    """Records copies from placeholders into parameters, through any views on both sides.

    Storages are known by identity; everything seen is kept alive for the length of the trace, or
    an identity could be used again.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: list[TracedCopy] = []
        self._alive: list[torch.Tensor] = list(parameters.values())
        self._parameters = {_storage_id(p): name for name, p in parameters.items()}
        self._sources: dict[int, tuple[str, ...]] = {}
        self._derived: set[int] = set()

    def add_source(self, name: str, placeholder: torch.Tensor) -> None:
        self._alive.append(placeholder)
        self._sources[_storage_id(placeholder)] = (name,)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.copy_.default and self._record(args[0], args[1]):
            return func(*args)  # without memory a copy only checks that the shapes fit
        if func in _FILLS and self._record(args[0], None):
            return args[0]
        result = func(*args, **(kwargs or {}))
        self._follow(func, (args, kwargs), result)
        return result

    def _record(self, target: torch.Tensor, source: torch.Tensor | None) -> bool:
        parameter = self._parameters.get(_storage_id(target))
        names = () if source is None else self._sources.get(_storage_id(source))
        if parameter is None or names is None:
            return False
        derived = source is not None and _storage_id(source) in self._derived
        source_dtype = target.dtype if source is None else source.dtype
        broadcast = source is not None and source.shape != target.shape
        as_published = source is not None and len(names) == 1 and not derived
        self.copies.append(
            TracedCopy(
                sources=names,
                parameter=parameter,
                offset=int(target.storage_offset()),
                shape=tuple(target.shape),
                strides=tuple(target.stride()),
                source_dtype=source_dtype,
                parameter_dtype=target.dtype,
                read=_view(source) if as_published else None,
                pure=not derived and not broadcast and source_dtype == target.dtype,
            )
        )
        return True

    def _follow(self, func: Any, arguments: Any, result: Any) -> None:
        """Remember which placeholders a tensor was computed from, or changed in place with."""
        names: dict[str, None] = {}
        for leaf in tree_leaves(arguments):
            if isinstance(leaf, torch.Tensor):
                names.update(dict.fromkeys(self._sources.get(_storage_id(leaf), ())))
        if not names:
            return
        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = _storage_id(leaf)
            known = self._sources.get(storage)
            # Otherwise it is a view of something known, with the same values.
            if known is None or func._schema.is_mutable:
                self._alive.append(leaf)
                self._sources[storage] = tuple(dict.fromkeys((*(known or ()), *names)))
                self._derived.add(storage)


def _view(source: Any) -> SourceView:
    return SourceView(
        offset=int(source.storage_offset()),
        shape=tuple(source.shape),
        strides=tuple(source.stride()),
    )


def _storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
