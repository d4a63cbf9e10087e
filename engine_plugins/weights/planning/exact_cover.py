"""Which tensors' boxes may overlap, found for all tensors at once.

Boxes that a line between two indices of an axis tells apart cannot overlap. So they are told apart
along one axis after another, again and again, until each stands alone or nothing parts them any
more. Every way of sharding cuts along axes, so nothing is left of sound offers but, in layouts that
no trainer has, boxes around a hole: whoever asks looks at those one by one.
"""

from __future__ import annotations

import numpy as np

from engine_plugins.weights.planning.box_table import BoxTable, Column

__all__ = ["not_told_apart", "sums_by_tensor"]

_MOST = 2**62


def not_told_apart(boxes: BoxTable) -> Column:
    """Tensors, by number, of which two boxes may overlap.

    Args:
        boxes: different ones without empty ones, sorted by tensor and then by their start.
    """
    axes = boxes.start.shape[1]
    rows = np.arange(len(boxes))
    group = boxes.tensor
    idle, axis = 0, 0
    as_given = True
    while len(rows) and idle < axes:
        if not as_given:
            order = np.lexsort((boxes.start[rows, axis], group))
            rows, group = rows[order], group[order]
        start = boxes.start[rows, axis]
        begins = _parted(group, start, start + boxes.shape[rows, axis])
        known = int(np.count_nonzero(group[1:] != group[:-1])) + 1
        idle = idle + 1 if int(begins.sum()) == known else 0
        group = begins.cumsum()
        alone = begins & np.append(begins[1:], True)
        rows, group = rows[~alone], group[~alone]
        axis, as_given = (axis + 1) % axes, False
    return np.unique(boxes.tensor[rows])


def sums_by_tensor(tensor: Column, values: Column, count: int) -> Column:
    """[count] sums of [n] values of tensors that come in order; exact, unlike weights of bins."""
    ends = np.searchsorted(tensor, np.arange(count + 1))
    before = np.concatenate([[0], values.cumsum()])
    sums: Column = before[ends[1:]] - before[ends[:-1]]
    return sums


def _parted(
    group: Column, start: Column, end: Column
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """[n] whether a row is the first of its group that no earlier row of it reaches into.

    Rows are sorted by group and start.
    """
    first = np.ones(len(group), np.bool_)
    first[1:] = group[1:] != group[:-1]
    if not len(first):
        return first
    number = first.cumsum() - 1
    # Each group is moved behind all ends of the one before: then one running maximum serves all.
    span = np.maximum.reduceat(end, np.flatnonzero(first))
    if float(span.sum(dtype=np.float64)) >= _MOST:
        return first
    behind = (span.cumsum() - span)[number]
    reached = np.maximum.accumulate(end + behind)
    first[1:] |= start[1:] + behind[1:] >= reached[:-1]
    return first
