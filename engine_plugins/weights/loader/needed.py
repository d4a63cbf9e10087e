"""Which boxes of each HF tensor an engine rank's loader reads, so that no others are fetched."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Protocol

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import Interval
from engine_plugins.weights.loader.loader_watch import SourceView, TracedCopy

__all__ = ["needed_boxes"]


class _Trace(Protocol):
    @property
    def copies(self) -> Sequence[TracedCopy]: ...


def needed_boxes(
    trace: _Trace, tensors: Sequence[LogicalTensor]
) -> Mapping[str, tuple[Interval, ...]]:
    """Disjoint boxes (start, shape) of every tensor that reaches this rank.

    They hold all that the loader's copies read, and may hold a little more: a view that is no box
    counts as the smallest box around it, a tensor that the loader computes with counts as a whole.
    """
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    boxes: dict[str, set[Interval]] = {}
    for copy in trace.copies:
        for name in copy.sources:
            box = None if copy.read is None else _box_around(copy.read, shapes[name])
            boxes.setdefault(name, set()).add(box or _whole(shapes[name]))
    return {name: _disjoint(found) for name, found in boxes.items()}


@functools.lru_cache(maxsize=4096)
def _box_around(view: SourceView, shape: tuple[int, ...]) -> Interval | None:
    """The smallest box that holds a view of a contiguous tensor, or None if it wraps around rows.

    Every axis of the view walks one axis of the tensor, in steps of one index or more.
    """
    if not prod(view.shape):
        return (0,) * len(shape), (0,) * len(shape)
    start, rest = [], view.offset
    for axis in range(len(shape)):
        index, rest = divmod(rest, prod(shape[axis + 1 :]))
        start.append(index)
    extent = [1] * len(shape)
    for size, stride in zip(view.shape, view.strides, strict=True):
        if size == 1 or stride == 0:
            continue
        axis = next(a for a in range(len(shape)) if prod(shape[a + 1 :]) <= stride)
        step, off_axis = divmod(stride, prod(shape[axis + 1 :]))
        reach = (size - 1) * step + 1
        if off_axis or extent[axis] != 1 or start[axis] + reach > shape[axis]:
            return None
        extent[axis] = reach
    return tuple(start), tuple(extent)


def _disjoint(boxes: Iterable[Interval]) -> tuple[Interval, ...]:
    """Boxes that overlap become the one box around them."""
    boxes = tuple(boxes)
    if len(boxes) == 1 and 0 not in boxes[0][1]:
        return boxes
    apart: list[Interval] = []
    for box in sorted(boxes):
        joined = box
        while clash := next((other for other in apart if _overlap(joined, other)), None):
            apart.remove(clash)
            joined = _hull(joined, clash)
        if prod(joined[1]):
            apart.append(joined)
    return tuple(apart)


def _overlap(one: Interval, other: Interval) -> bool:
    return all(
        a < b + b_size and b < a + a_size for a, a_size, b, b_size in zip(*one, *other, strict=True)
    )


def _hull(one: Interval, other: Interval) -> Interval:
    start = tuple(map(min, one[0], other[0]))
    ends = [max(a + a_size, b + b_size) for a, a_size, b, b_size in zip(*one, *other, strict=True)]
    return start, tuple(end - first for first, end in zip(start, ends, strict=True))


def _whole(shape: tuple[int, ...]) -> Interval:
    return (0,) * len(shape), shape
