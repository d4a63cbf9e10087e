"""Which tensors a loader reads alike when they are not contiguous, seen by showing it such ones.

A rank that needs some columns of a matrix has room for these alone (`planning/places.py`): the
loader is then given a view of the whole shape, with the strides of that room. One that flattens a
tensor, or looks at its strides, is given the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod

from engine_plugins.errors import WeightMismatchError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import Interval
from engine_plugins.weights.loader.loader_watch import SourceView, TracedCopy

__all__ = ["Shown", "read_alike", "room_strides"]

Shown = Callable[[Mapping[str, tuple[int, ...]]], Sequence[TracedCopy]]
"""Runs the loader with tensors of these strides, in elements; says what it copies."""

ATTEMPTS = 4
"""Kinds of tensors that are left out one by one, before all are."""
_NUMBERS = re.compile(r"\d+")


def room_strides(
    tensors: Iterable[LogicalTensor], needed: Mapping[str, Sequence[Interval]]
) -> dict[str, tuple[int, ...]]:
    """Strides in elements of the tensors that would not look contiguous, by name."""
    found: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        boxes = needed.get(tensor.name, ())
        if len(tensor.shape) < 2 or not boxes:
            continue
        extent = tuple(
            max(start[axis] + size[axis] for start, size in boxes)
            - min(start[axis] for start, _ in boxes)
            for axis in range(len(tensor.shape))
        )
        if extent[1:] != tensor.shape[1:]:
            found[tensor.name] = _contiguous(extent)
    return found


def read_alike(
    strides: Mapping[str, tuple[int, ...]],
    tensors: Sequence[LogicalTensor],
    shown: Sequence[TracedCopy],
    show: Shown,
) -> frozenset[str]:
    """The names of those tensors that the loader reads alike with other strides.

    Args:
        strides: of tensors that would not be contiguous, in elements.
        tensors: that the loader was shown; others of them are taken to be treated alike, where
            their names differ in numbers alone.
        shown: what it copied when they were contiguous.
        show: shows it the same tensors with other strides.
    """
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    tried = {name: each for name, each in strides.items() if name in shapes}
    for _ in range(ATTEMPTS):
        if not tried:
            return frozenset()
        try:
            seen = show(tried)
        except WeightMismatchError as error:
            other = {name for name in tried if error.message.startswith(f"{name}:")}
        else:
            if len(seen) != len(shown):
                return frozenset()
            other = _read_otherwise(shown, seen, tried, shapes)
        if not other:
            kinds = {_kind(name) for name in tried}
            left_out = {_kind(name) for name in shapes.keys() & strides.keys() - tried.keys()}
            return frozenset(name for name in strides if _kind(name) in kinds - left_out)
        kinds = {_kind(name) for name in other}
        tried = {name: each for name, each in tried.items() if _kind(name) not in kinds}
    return frozenset()


def _read_otherwise(
    shown: Sequence[TracedCopy],
    seen: Sequence[TracedCopy],
    strides: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> set[str]:
    """Tensors of which a copy is not the one that was shown, in their new places."""
    other: set[str] = set()
    for before, now in zip(shown, seen, strict=True):
        touched = {*before.sources, *now.sources} & strides.keys()
        wanted = before
        if before.read is not None and touched:
            name = before.sources[0]
            wanted = before._replace(read=_moved(before.read, shapes[name], strides[name]))
        if touched and (wanted != now or now.read is None):
            other |= touched
    return other


def _moved(view: SourceView, shape: tuple[int, ...], strides: tuple[int, ...]) -> SourceView | None:
    """A view of a contiguous tensor, as one of a tensor with other strides; None if it is none."""
    plain = _contiguous(shape)
    offset, rest = 0, view.offset
    for whole, other in zip(plain, strides, strict=True):
        index, rest = divmod(rest, whole)
        offset += index * other
    steps: list[int] = []
    for size, step in zip(view.shape, view.strides, strict=True):
        axis = next((a for a, whole in enumerate(plain) if whole <= step), -1)
        if size > 1 and (axis < 0 or step % plain[axis]):
            return None
        steps.append(step // plain[axis] * strides[axis] if axis >= 0 else step)
    return SourceView(offset, view.shape, tuple(steps))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _kind(name: str) -> str:
    return _NUMBERS.sub("#", name)
