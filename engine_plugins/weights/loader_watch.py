"""Two ways to see what a loader copies: following every operation, or intercepting the copies.

To follow is to see everything, and costs more than the loader itself. To intercept costs a third,
and knows of a source only that it is a view of a placeholder: what was computed first shows as a
source that nobody knows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["SourceView", "TracedCopy", "WatchedCopies", "following", "intercepting"]

_COPY = torch.ops.aten.copy_.default
_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)


class SourceView(NamedTuple):
    """The elements of one whole tensor that a copy read: a strided view of it, in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TracedCopy(NamedTuple):
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
    pure: bool
    """False where the loader changed the values (a cast, arithmetic) before or in the copy."""
    read: SourceView | None = None
    """What of its one source the copy read; None where values were computed first."""


class WatchedCopies:
    """Copies from placeholders into parameters, through any views on both sides.

    Storages are known by identity; everything seen is kept alive for the length of the watch, or
    an identity could be used again.

    Attributes:
        copies: in the loader's order.
        from_unknown: whether a parameter was given something that is not known to come from a
            placeholder.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self.copies: list[TracedCopy] = []
        self.from_unknown = False
        self._alive: list[torch.Tensor] = list(parameters.values())
        self._placeholders: list[torch.Tensor] = []
        self._parameters = {_storage_id(p): name for name, p in parameters.items()}
        self._sources: dict[int, tuple[str, ...]] = {}
        self._derived: set[int] = set()

    @property
    def as_published(self) -> bool:
        """Whether every copy read a placeholder as it was handed out, and none was written to."""
        unchanged = all(placeholder._version == 0 for placeholder in self._placeholders)
        return unchanged and not self._derived and not self.from_unknown

    def add_source(self, name: str, placeholder: torch.Tensor) -> None:
        """Know a placeholder, before the loader does."""
        self._placeholders.append(placeholder)
        self._sources[_storage_id(placeholder)] = (name,)

    def record(self, target: torch.Tensor, source: torch.Tensor | None) -> bool:
        """Note a copy, or a constant if there is no source; False where it is none of ours."""
        parameter = self._parameters.get(_storage_id(target))
        if parameter is None:
            return False
        names = () if source is None else self._sources.get(_storage_id(source))
        if names is None:
            self.from_unknown = True
            return False
        derived = source is not None and _storage_id(source) in self._derived
        source_dtype = target.dtype if source is None else source.dtype
        broadcast = source is not None and source.shape != target.shape
        as_handed_out = source is not None and len(names) == 1 and not derived
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

    def follow(self, func: Any, arguments: Any, result: Any) -> None:
        """Remember which placeholders a tensor was computed from, or changed in place with."""
        names: dict[str, None] = {}
        for leaf in tree_leaves(arguments):
            if isinstance(leaf, torch.Tensor):
                names.update(dict.fromkeys(self._sources.get(_storage_id(leaf), ())))
        changed = next(iter(arguments[0]), None) if func._schema.is_mutable else None
        if isinstance(changed, torch.Tensor):
            self._note_change(changed, tuple(names))
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

    def _note_change(self, target: torch.Tensor, names: tuple[str, ...]) -> None:
        """A parameter that is changed in place no longer holds what was copied into it."""
        parameter = self._parameters.get(_storage_id(target))
        given = [
            name for copy in self.copies if copy.parameter == parameter for name in copy.sources
        ]
        sources = tuple(dict.fromkeys((*given, *names)))
        if parameter is None or not sources:
            return
        self.from_unknown = True
        self.copies.append(
            TracedCopy(
                sources=sources,
                parameter=parameter,
                offset=int(target.storage_offset()),
                shape=(0,),
                strides=(1,),
                source_dtype=target.dtype,
                parameter_dtype=target.dtype,
                pure=False,
            )
        )


def following(copies: WatchedCopies) -> TorchDispatchMode:
    """A context in which every operation is seen, and copies into parameters are recorded."""
    return _Follower(copies)


@contextmanager
def intercepting(copies: WatchedCopies) -> Iterator[None]:
    """A context in which torch's copies and fills are seen when they are called by name.

    Only this thread's are looked at; others may copy meanwhile, as ever.
    """
    watched = threading.get_ident()

    def copy(target: torch.Tensor, source: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if threading.get_ident() == watched:
            copies.record(target, source)
        return plain_copy(target, source, *args, **kwargs)

    def noting(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def fill(target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if threading.get_ident() == watched:
                copies.record(target, None)
            return plain(target, *args, **kwargs)

        return fill

    plain_copy = torch.Tensor.copy_
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
            delattr(torch.Tensor, name)  # the base class's is seen again


class _Follower(TorchDispatchMode):
    """Sees every operation."""

    def __init__(self, copies: WatchedCopies) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copies = copies

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in a loader, and torch's guard against it is slow."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.is_view:  # most of what loaders do; the storage stays the one that is known
            return func(*args, **(kwargs or {}))
        if func is _COPY and self._copies.record(args[0], args[1]):
            return func(*args)  # without memory a copy only checks that the shapes fit
        if func in _FILLS and self._copies.record(args[0], None):
            return args[0]
        result = func(*args, **(kwargs or {}))
        self._copies.follow(func, (args, kwargs), result)
        return result


def _view(source: Any) -> SourceView:
    return SourceView(
        offset=int(source.storage_offset()),
        shape=tuple(source.shape),
        strides=tuple(source.stride()),
    )


def _storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
