"""How many elements of one storage some strided places hold together, each element counted once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Place", "distinct_numel"]

_Axes = tuple[tuple[int, int], ...]
"""Sizes and strides of more than one element each, the longest stride first."""
_Runs = npt.NDArray[np.int64]
"""[n, 2]: first element of each run, and the one behind its last."""
_NOTHING: _Runs = np.empty((0, 2), np.int64)


class Place(NamedTuple):
    """A view of a storage: offset, shape and strides in elements; strides are not negative."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def distinct_numel(places: Iterable[Place]) -> int:
    """Elements in any of these places; as many as their shapes say only if no two overlap.

    Blocks, and parts of the same rows however many, cost a sort of the places. Others are walked
    run by run.
    """
    return _count([(place.offset, _axes(place)) for place in places if prod(place.shape)])


def _axes(place: Place) -> _Axes:
    """The axes of a place, those that run through each other joined."""
    pairs = zip(place.shape, place.strides, strict=True)
    joined: list[tuple[int, int]] = []
    for size, stride in sorted(((n, s) for n, s in pairs if n > 1 and s), key=lambda each: each[1]):
        if joined and joined[-1][0] * joined[-1][1] == stride:
            joined[-1] = (joined[-1][0] * size, joined[-1][1])
        else:
            joined.append((size, stride))
    return tuple(joined[::-1])


def _count(walks: Sequence[tuple[int, _Axes]]) -> int:
    outer = {axes[:1] for _, axes in walks}
    if len(outer) == 1 and outer != {()}:
        ((size, stride),) = outer.pop()
        first = min(offset for offset, _ in walks)
        inner = [(offset - first, axes[1:]) for offset, axes in walks]
        if max(offset + _reach(axes) for offset, axes in inner) <= stride:
            return size * _count(inner)  # all do the same in every row
    return _united(np.concatenate([_runs(offset, axes) for offset, axes in walks] or [_NOTHING]))


def _reach(axes: _Axes) -> int:
    """Elements from the first to the last, both counted."""
    return 1 + sum((size - 1) * stride for size, stride in axes)


def _runs(offset: int, axes: _Axes) -> _Runs:
    """A place's contiguous runs."""
    length = axes[-1][0] if axes and axes[-1][1] == 1 else 1
    starts = np.array([offset], np.int64)
    for size, stride in axes if length == 1 else axes[:-1]:
        starts = (starts[:, None] + np.arange(size) * stride).ravel()
    return np.stack([starts, starts + length], axis=1)


def _united(runs: _Runs) -> int:
    """Elements in any of the runs."""
    runs = runs[runs[:, 0].argsort()]
    reached = np.maximum.accumulate(runs[:, 1])
    begins = np.maximum(runs[1:, 0], reached[:-1])
    new = np.maximum(runs[1:, 1] - begins, 0)
    return int(runs[:1, 1].sum() - runs[:1, 0].sum() + new.sum())
