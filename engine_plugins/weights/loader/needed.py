"""Which boxes of each HF tensor an engine rank's loader reads, so that no others are fetched."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """Boxes that touch become one, and those that overlap the one box around them.

    A loader that takes a fused tensor expert by expert reads hundreds of boxes; most are one.
    """
    found = [box for box in boxes if prod(box[1])]
    if len(found) > 1:
        for axis in range(len(found[0][0])):
            found = _joined(found, axis)
        found = _told_apart(found)
    return tuple(sorted(found))


def _joined(boxes: Iterable[Interval], axis: int) -> list[Interval]:
    """Boxes that are alike but for an axis, and follow each other there, as one."""
    alike: dict[Interval, list[tuple[int, int]]] = {}
    for start, extent in boxes:
        key = (_without(start, axis), _without(extent, axis))
        alike.setdefault(key, []).append((start[axis], start[axis] + extent[axis]))
    joined: list[Interval] = []
    for (start, extent), ranges in alike.items():
        for begin, end in _united(sorted(ranges)):
            box = (_with(start, axis, begin), _with(extent, axis, end - begin))
            joined.append(box)
    return joined


def _united(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Sorted ranges, those that touch or overlap as one."""
    ranges = iter(ranges)
    begin, end = next(ranges)
    for first, last in ranges:
        if first > end:
            yield begin, end
            begin, end = first, last
        end = max(end, last)
    yield begin, end


def _told_apart(boxes: list[Interval], axis: int = 0, idle: int = 0) -> list[Interval]:
    """Boxes that lines across an axis part stay apart; the others become the one around them."""
    axes = len(boxes[0][0])
    if len(boxes) == 1 or idle == axes:
        return [_hull(boxes)]
    boxes.sort(key=lambda box: box[0][axis])
    groups: list[list[Interval]] = []
    reached = 0
    for start, extent in boxes:
        if not groups or start[axis] >= reached:
            groups.append([])
        groups[-1].append((start, extent))
        reached = max(reached, start[axis] + extent[axis])
    idle = idle + 1 if len(groups) == 1 else 0
    return [box for group in groups for box in _told_apart(group, (axis + 1) % axes, idle)]


def _hull(boxes: Sequence[Interval]) -> Interval:
    start = tuple(map(min, zip(*(start for start, _ in boxes), strict=True)))
    ends = (map(sum, zip(*box, strict=True)) for box in boxes)
    end = map(max, zip(*ends, strict=True))
    return start, tuple(last - first for first, last in zip(start, end, strict=True))


def _without(numbers: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return numbers[:axis] + numbers[axis + 1 :]


def _with(numbers: tuple[int, ...], axis: int, number: int) -> tuple[int, ...]:
    return (*numbers[:axis], number, *numbers[axis:])


def _whole(shape: tuple[int, ...]) -> Interval:
    return (0,) * len(shape), shape
