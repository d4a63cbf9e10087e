"""Boxes of many tensors as numpy columns, so that a model of a million of them plans in no time.

Axes are aligned at the right: a table of matrices and vectors has two, and a vector's first one is
an axis of a single index. Columns are [n] or [n, axes], int64 unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine_plugins.errors import PlanError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import Interval

__all__ = [
    "BoxTable",
    "Column",
    "LiveBox",
    "TargetTable",
    "TensorTable",
    "contiguous_strides",
    "every",
    "gathered",
    "summed",
    "target_table",
    "volumes",
]

Column = npt.NDArray[np.int64]

_MOST_BYTES = 2**62
"""Of all tensors together: sums and products of sizes stay 64-bit numbers."""


class TensorTable:
    """Whole tensors by number, and what is the same for all boxes of each.

    Attributes:
        axes: of the widest tensor, at least 1.
        dtypes: of each.
        ndim, itemsize: [n].
        shape: [n, axes], leading axes of one index.
        strides_bytes: [n, axes], of a contiguous tensor.

    Raises:
        PlanError: the tensors are larger than any memory.
    """

    def __init__(self, tensors: Sequence[LogicalTensor]) -> None:
        self.tensors = tensors
        self.number = {tensor.name: number for number, tensor in enumerate(tensors)}
        self.ndim = np.fromiter((len(t.shape) for t in tensors), np.int64, len(tensors))
        self.dtypes = [tensor.dtype for tensor in tensors]
        sizes = {dtype: dtype.itemsize for dtype in set(self.dtypes)}
        self.itemsize = np.fromiter(map(sizes.__getitem__, self.dtypes), np.int64, len(tensors))
        self.axes = max(int(self.ndim.max(initial=0)), 1)
        self.shape = _aligned([tensor.shape for tensor in tensors], self.axes, 1)
        self.strides_bytes = contiguous_strides(self.shape, self.itemsize)
        together = float((self.shape.prod(axis=1, dtype=np.float64) * self.itemsize).sum())
        if together > _MOST_BYTES:
            raise PlanError(
                f"the tensors have {together:.3g} bytes together, more than any memory",
                remedy="publish the model that this engine serves",
            )

    @property
    def nbytes(self) -> Column:
        """[n] bytes of each whole tensor."""
        return volumes(self.shape) * self.itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class BoxTable:
    """Boxes of tensors: `tensor` [n] by number, `start` and `shape` [n, axes] in elements."""

    tensor: Column
    start: Column
    shape: Column

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, rows: Column) -> BoxTable:
        columns = (gathered(each, rows) for each in (self.tensor, self.start, self.shape))
        return BoxTable(**dict(zip(("tensor", "start", "shape"), columns, strict=True)))


class LiveBox(NamedTuple):
    """A box of a tensor and the memory of a live parameter that it goes into."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    address: int
    """Of the box's first element."""
    strides_bytes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetTable:
    """What a rank wants, and where it goes.

    Attributes:
        boxes: [n] of them, by tensor.
        offset: [n] bytes to where the box's first element goes: from the start of its step's
            buffer, or an address in live memory.
        strides_bytes: [n, axes] of the box there.
    """

    boxes: BoxTable
    offset: Column
    strides_bytes: Column


def target_table(
    tensors: TensorTable,
    needed: Mapping[str, Sequence[Interval]],
    live: Mapping[str, Sequence[LiveBox]],
    offsets: Column,
    strides: Column | None = None,
) -> TargetTable:
    """The boxes that are wanted and where they go, in the tensors' order.

    Args:
        tensors: all of them.
        needed: boxes by tensor; without an entry, here or in `live`, a tensor is wanted whole.
        live: boxes that go into live parameters, by tensor.
        offsets: [n] where each tensor of the others goes, as if it went there whole.
        strides: [n, axes] in bytes of each there; contiguous ones if None.
    """
    chosen: list[int] = []
    boxes: list[Interval] = []
    rows: list[int] = []
    placed: list[LiveBox] = []
    for number, tensor in enumerate(tensors.tensors):
        into = live.get(tensor.name)
        if into is None:
            wanted = needed.get(tensor.name)
            if wanted is None:
                wanted = [((0,) * len(tensor.shape), tensor.shape)]
            boxes += wanted
            chosen += [number] * len(wanted)
        else:
            rows += range(len(boxes), len(boxes) + len(into))
            placed += into
            boxes += [(box.start, box.shape) for box in into]
            chosen += [number] * len(into)
    table = BoxTable(
        tensor=np.array(chosen, dtype=np.int64),
        start=_aligned([start for start, _ in boxes], tensors.axes, 0),
        shape=_aligned([shape for _, shape in boxes], tensors.axes, 1),
    )
    strides = gathered(tensors.strides_bytes if strides is None else strides, table.tensor)
    offset = offsets[table.tensor] + summed(table.start * strides)
    offset[rows] = [box.address for box in placed]
    strides[rows] = _aligned([box.strides_bytes for box in placed], tensors.axes, 0)
    return TargetTable(boxes=table, offset=offset, strides_bytes=strides)


def gathered(column: Column, rows: Column) -> Column:
    """Rows of a column or table, by number: faster than an index, which looks at each one more."""
    found: Column = column.take(rows, axis=0)
    return found


# numpy walks a short last axis row by row; column by column is ten times as fast.


def volumes(shape: Column) -> Column:
    """[n] elements of [n, axes] shapes."""
    product = shape[:, 0].copy()
    for axis in range(1, shape.shape[1]):
        product *= shape[:, axis]
    return product


def summed(table: Column) -> Column:
    """[n] sums of the rows of [n, axes]."""
    total = table[:, 0].copy()
    for axis in range(1, table.shape[1]):
        total += table[:, axis]
    return total


def every(marks: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """[n] whether all of a row of [n, axes] is so."""
    found = marks[:, 0].copy()
    for axis in range(1, marks.shape[1]):
        found &= marks[:, axis]
    return found


def contiguous_strides(shape: Column, itemsize: Column) -> Column:
    """[n, axes] bytes between neighbours of contiguous boxes."""
    strides = np.empty_like(shape)
    strides[:, -1] = itemsize
    for axis in reversed(range(1, shape.shape[1])):
        strides[:, axis - 1] = strides[:, axis] * shape[:, axis]
    return strides


def _aligned(columns: Sequence[Sequence[int]], axes: int, fill: int) -> Column:
    """[n, axes] from lists of at most `axes` numbers, at the right; longer ones lose the front."""
    lengths = np.fromiter(map(len, columns), np.int64, len(columns))
    flat = np.fromiter(chain.from_iterable(columns), np.int64, int(lengths.sum()))
    row = np.repeat(np.arange(len(columns)), lengths)
    ends = lengths.cumsum()
    column = axes - (np.repeat(ends, lengths) - np.arange(len(flat)))
    table = np.full((len(columns), axes), fill, np.int64)
    fits = column >= 0
    table[row[fits], column[fits]] = flat[fits]
    return table
