"""Two ways to see what a loader copies: following every operation, or intercepting the copies.

To follow is to see everything, and costs more than the loader itself. To intercept costs a third,
and knows of a source only that it is a view of a placeholder: what was computed first shows as a
source that nobody knows.

Watched are the parameters, and the tensors that the model keeps beside them (`engine_tensors.py`).
Parameters are on meta. Buffers keep their memory, because some loaders read them (which experts
live here); what comes from a placeholder has no values, so a copy of it into a buffer is recorded
and not executed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeGuard

import torch
from torch.utils._pytree import tree_leaves, tree_map

from engine_plugins.weights.loader.loader_mode import COPY, FILLS, LoaderMode, storage_id
from engine_plugins.weights.loader.watched_memory import WatchedMemory

__all__ = ["SourceView", "TracedCopy", "WatchedCopies", "following", "intercepting"]

_ITEM = torch.ops.aten._local_scalar_dense.default
_FIRST_STAND_IN = 2**52 + 1
"""Numbers that stand in for a placeholder's element: no loader computes with ones so large."""


class SourceView(NamedTuple):
    """The elements of one whole tensor that a copy read: a strided view of it, in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TracedCopy(NamedTuple):
    """One copy that the loader made into a parameter of the engine, or into a tensor beside them.

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
    pure: bool
    """False where the loader changed the values (a cast, arithmetic) before or in the copy."""
    read: SourceView | None = None
    """What of its one source the copy read; None where values were computed first."""


class WatchedCopies:
    """Copies from placeholders into the engine's tensors, through any views on both sides.

    Storages are known by identity; everything seen is kept alive for the length of the watch, or
    an identity could be used again.

    Args:
        parameters: by name.
        beside: buffers and other tensors of the model, by name.
        look_again: the parameters as they are now; a loader may make one when it meets its tensor.

    Attributes:
        copies: in the loader's order.
        overwritten: parameters that were given something that is not known to come from a
            placeholder.
        changed: parameters that were changed in place.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        beside: Mapping[str, torch.Tensor] | None = None,
        look_again: Callable[[], Mapping[str, torch.Tensor]] = dict,
    ) -> None:
        self.copies: list[TracedCopy] = []
        self.overwritten: set[str] = set()
        self.changed: set[str] = set()
        self._beside = dict(beside or {})
        self._look_again = look_again
        self._alive: list[torch.Tensor] = [*parameters.values(), *self._beside.values()]
        self._placeholders: list[torch.Tensor] = []
        self._parameters = set(parameters)
        self._targets = WatchedMemory()
        for name, tensor in self._beside.items():
            self._targets.add(name, tensor, is_parameter=False)
        for name, tensor in parameters.items():
            self._targets.add(name, tensor, is_parameter=True)
        self._sources: dict[int, tuple[str, ...]] = {}
        self._filled: dict[str, dict[str, None]] = {}
        self._derived: set[int] = set()
        self._stand_ins: dict[int, torch.Tensor] = {}

    @property
    def as_published(self) -> bool:
        """Whether every copy read a placeholder as it was handed out, and none was written to."""
        unchanged = all(placeholder._version == 0 for placeholder in self._placeholders)
        changed = self.changed or self.overwritten
        return unchanged and not changed and not self._derived and not self._stand_ins

    def add_source(self, name: str, placeholder: torch.Tensor) -> None:
        """Know a placeholder, before the loader does."""
        self._placeholders.append(placeholder)
        self._sources[storage_id(placeholder)] = (name,)

    def record(self, target: torch.Tensor, source: torch.Tensor | None) -> bool:
        """Note a copy, or a constant if there is no source; False where it is none of ours."""
        known = self._targets.knows_storage_of(target)
        if not known and source is not None and self._names_of(source):
            self._watch_new()
        parameter = self._targets.name_of(target)
        is_parameter = parameter in self._parameters
        if parameter is None or (source is None and not is_parameter):
            return False
        names = () if source is None else self._names_of(source)
        if names is None:
            if is_parameter:
                self.overwritten.add(parameter)
            return False
        derived = source is not None and self._is_derived(source)
        if derived:  # what reads a filled tensor computes, even if it only copies
            self._derived.add(storage_id(target))
        source_dtype = target.dtype if source is None else source.dtype
        broadcast = source is not None and source.shape != target.shape
        as_handed_out = source is not None and len(names) == 1 and not derived
        self._filled.setdefault(parameter, {}).update(dict.fromkeys(names))
        self.copies.append(
            TracedCopy(
                sources=names,
                parameter=parameter,
                offset=int(target.storage_offset()),
                shape=tuple(target.shape),
                strides=tuple(target.stride()),
                source_dtype=source_dtype,
                parameter_dtype=target.dtype,
                read=_view(source) if as_handed_out else None,
                pure=not derived and not broadcast and source_dtype == target.dtype,
            )
        )
        return True

    def number_for(self, tensor: torch.Tensor) -> int | float | None:
        """A number that stands in for a placeholder's only element, until it is filled in."""
        if not tensor.is_meta or tensor.dtype == torch.bool or self._names_of(tensor) is None:
            return None
        number = _FIRST_STAND_IN + len(self._stand_ins)
        self._stand_ins[number] = tensor
        return float(number) if tensor.is_floating_point() else number

    def meant_by(self, value: object) -> torch.Tensor | None:
        """The tensor that a filled-in value was read from, if it came from a placeholder."""
        if isinstance(value, torch.Tensor):
            return value if self._names_of(value) is not None else None
        return self._stand_ins.get(int(value)) if _is_stand_in(value) else None

    def note_replaced(self, beside: Mapping[str, torch.Tensor]) -> None:
        """Note tensors beside the parameters that the loader has made anew from placeholders."""
        for name, tensor in beside.items():
            names = self._names_of(tensor)
            if tensor is not self._beside.get(name) and names:
                self._add_change(name, tensor, names)

    def follow(self, func: Any, arguments: Any, result: Any) -> None:
        """Remember which placeholders a tensor was computed from, or changed in place with."""
        names: dict[str, None] = {}
        for leaf in tree_leaves(arguments):
            if isinstance(leaf, torch.Tensor):
                names.update(dict.fromkeys(self._names_of(leaf) or ()))
        changed = _changed(func, *arguments) if func._schema.is_mutable else None
        if changed is not None:
            self._note_change(changed, tuple(names))
        if not names:
            return
        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = storage_id(leaf)
            known = self._sources.get(storage)
            # Otherwise it is a view of something known, with the same values.
            if known is None or func._schema.is_mutable:
                self._alive.append(leaf)
                self._sources[storage] = tuple(dict.fromkeys((*(known or ()), *names)))
                self._derived.add(storage)

    def _watch_new(self) -> None:
        for name, tensor in self._look_again().items():
            if not self._targets.knows_storage_of(tensor):
                self._alive.append(tensor)
                self._parameters.add(name)
                self._targets.add(name, tensor, is_parameter=True)

    def _names_of(self, tensor: torch.Tensor) -> tuple[str, ...] | None:
        """Placeholders behind a tensor; None if there are none."""
        known = self._sources.get(storage_id(tensor))
        filled = self._filled and known is None and self._targets.name_of(tensor)
        if filled and filled in self._filled:
            return tuple(self._filled[filled])
        return known

    def _is_derived(self, tensor: torch.Tensor) -> bool:
        storage = storage_id(tensor)
        return storage in self._derived or storage not in self._sources

    def _note_change(self, target: torch.Tensor, names: tuple[str, ...]) -> None:
        """A parameter that is changed in place no longer holds what was copied into it."""
        name = self._targets.name_of(target)
        if name is None:
            return
        sources = tuple(dict.fromkeys((*self._filled.get(name, ()), *names)))
        if name in self._parameters:
            self.changed.add(name)
        if sources:
            self._add_change(name, target, sources)

    def _add_change(self, name: str, target: torch.Tensor, sources: tuple[str, ...]) -> None:
        """A copy of no elements: it covers nothing, and says that values were computed."""
        self.copies.append(
            TracedCopy(
                sources=sources,
                parameter=name,
                offset=int(target.storage_offset()),
                shape=(0,),
                strides=(1,),
                source_dtype=target.dtype,
                parameter_dtype=target.dtype,
                pure=False,
            )
        )


def following(copies: WatchedCopies) -> LoaderMode:
    """A context in which every operation is seen, and copies into parameters are recorded."""
    return _Follower(copies)


@contextmanager
def intercepting(copies: WatchedCopies) -> Iterator[None]:
    """A context in which torch's copies and fills are seen when they are called by name.

    Only this thread's are looked at; others may copy meanwhile, as ever.
    """
    watched = threading.get_ident()

    def copy(target: torch.Tensor, source: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if threading.get_ident() == watched and copies.record(target, source):
            return _checked(target, source)
        return plain_copy(target, source, *args, **kwargs)

    def noting(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def fill(target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if threading.get_ident() == watched:
                copies.record(target, None)
            return plain(target, *args, **kwargs)

        return fill

    plain_copy = torch.Tensor.copy_
    here_before = dict(vars(torch.Tensor))
    changed = {
        "copy_": copy,
        "fill_": noting(torch.Tensor.fill_),
        "zero_": noting(torch.Tensor.zero_),
    }
    for name, function in changed.items():
        setattr(torch.Tensor, name, function)
    try:
        yield
    finally:
        for name in changed:
            if name in here_before:  # another library's
                setattr(torch.Tensor, name, here_before[name])
            else:
                delattr(torch.Tensor, name)  # the base class's is seen again


class _Follower(LoaderMode):
    """Sees every operation."""

    def __init__(self, copies: WatchedCopies) -> None:
        super().__init__()
        self._copies = copies

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.is_view:  # most of what loaders do; the storage stays the one that is known
            return func(*args, **(kwargs or {}))
        if func is COPY and self._copies.record(args[0], args[1]):
            return _checked(args[0], args[1])
        if func in FILLS and self._filled(*args):
            return args[0]
        number = self._copies.number_for(args[0]) if func is _ITEM else None
        if number is not None:
            return number
        result = _without_memory(func, args, kwargs or {})
        self._copies.follow(func, (args, kwargs or {}), result)
        return result

    def _filled(self, target: torch.Tensor, value: object = 0) -> bool:
        """Note a constant, or the one element of a placeholder."""
        source = self._copies.meant_by(value)
        if source is not None and source.numel() == target.numel() == 1:
            source = source.view(target.shape)
        return self._copies.record(target, source)


def _checked(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Check that shapes fit, as a copy without memory does, and leave the target's values alone."""
    torch.Tensor.expand(source, target.shape)
    return target


def _changed(func: Any, args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The tensor that an operation writes to."""
    written = kwargs.get("out", next(iter(args), None))
    return written if isinstance(written, torch.Tensor) else None


def _without_memory(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation; where one tensor has no values, on none of the others'."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if len({tensor.is_meta for tensor in tensors}) < 2:
        return func(*args, **kwargs)
    args_on_meta, kwargs_on_meta = tree_map(_on_meta, (args, kwargs))
    result = func(*args_on_meta, **kwargs_on_meta)
    return _changed(func, args, kwargs) if func._schema.is_mutable else result


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _is_stand_in(value: object) -> TypeGuard[int | float]:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and value >= _FIRST_STAND_IN  # type: ignore[operator]


def _view(source: Any) -> SourceView:
    return SourceView(
        offset=int(source.storage_offset()),
        shape=tuple(source.shape),
        strides=tuple(source.stride()),
    )
