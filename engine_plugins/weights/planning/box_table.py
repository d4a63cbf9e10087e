"""Boxes of many tensors as numpy columns, so that a model of a million of them plans in no time.

Axes are aligned at the right: a table of matrices and vectors has two, and a vector's first one is
an axis of a single index. Columns are [n] or [n, axes], int64 unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine_plugins.errors import PlanError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import Interval, check_exact_coverage
from engine_plugins.weights.contract.manifest import SourceManifest, numbers

__all__ = [
    "BoxTable",
    "Column",
    "LiveBox",
    "SourceTable",
    "TargetTable",
    "TensorTable",
    "contiguous_strides",
    "source_table",
    "target_table",
    "volumes",
]

Column = npt.NDArray[np.int64]

_SHOWN = 8
_MOST_PAIRS = 16
"""Tensors in more boxes than this are checked for overlaps one by one."""


class TensorTable:
    """Whole tensors by number, and what is the same for all boxes of each.

    Attributes:
        axes: of the widest tensor, at least 1.
        ndim, itemsize: [n].
        shape: [n, axes], leading axes of one index.
        strides_bytes: [n, axes], of a contiguous tensor.
    """

    def __init__(self, tensors: Sequence[LogicalTensor]) -> None:
        self.tensors = tensors
        self.number = {tensor.name: number for number, tensor in enumerate(tensors)}
        self.ndim = np.fromiter((len(t.shape) for t in tensors), np.int64, len(tensors))
        sizes = {dtype: dtype.itemsize for dtype in {tensor.dtype for tensor in tensors}}
        self.itemsize = np.fromiter((sizes[t.dtype] for t in tensors), np.int64, len(tensors))
        self.axes = max(int(self.ndim.max(initial=0)), 1)
        self.shape = _aligned([tensor.shape for tensor in tensors], self.axes, 1)
        self.strides_bytes = contiguous_strides(self.shape, self.itemsize)

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

    def __getitem__(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> BoxTable:
        return BoxTable(tensor=self.tensor[rows], start=self.start[rows], shape=self.shape[rows])


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


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceTable:
    """What all sources hold, sorted so that equal boxes follow each other.

    Attributes:
        boxes: [n] of them.
        source, device: [n]; `source` is the manifest's number.
        address: [n] uint64, of the box's first element in its source's memory.
        strides_bytes: [n, axes].
        first: [m] rows of the first of each distinct box; `first[i + 1]` ends its replicas.
    """

    boxes: BoxTable
    source: Column
    device: Column
    address: npt.NDArray[np.uint64]
    strides_bytes: Column
    first: Column

    @property
    def distinct(self) -> BoxTable:
        """Every box once."""
        return self.boxes[self.first[:-1]]


def source_table(manifests: Sequence[SourceManifest], tensors: TensorTable) -> SourceTable:
    """Read the manifests' columns; boxes of other tensors are left out, and empty ones.

    Raises:
        PlanError: a gap, an overlap or a box outside; the text names tensor and boxes.
    """
    parts = [_nothing(tensors.axes)]
    parts += [_read(number, manifest, tensors) for number, manifest in enumerate(manifests)]
    tensor, start, shape, source, device, address, strides = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    filled = np.flatnonzero(volumes(shape))
    keys = [*shape[filled].T[::-1], *start[filled].T[::-1], tensor[filled]]
    order = filled[np.lexsort(keys)]
    boxes = BoxTable(tensor=tensor, start=start, shape=shape)[order]
    table = SourceTable(
        boxes=boxes,
        source=source[order],
        device=device[order],
        address=address[order],
        strides_bytes=strides[order],
        first=_first_rows(boxes),
    )
    for number in _not_covered(table.distinct, tensors):
        name = tensors.tensors[number].name
        offers = _offers_of(name, manifests)
        try:
            check_exact_coverage(name, tensors.tensors[number].shape, [box for _, box in offers])
        except PlanError as error:
            said = [f"{who} offers {shape} at {start}" for who, (start, shape) in offers[:_SHOWN]]
            error.message += "; " + ", ".join(said or ["nobody offers it"])
            raise
    return table


def target_table(
    tensors: TensorTable,
    needed: Mapping[str, Sequence[Interval]],
    live: Mapping[str, Sequence[LiveBox]],
    offsets: Column,
) -> TargetTable:
    """The boxes that are wanted and where they go, in the tensors' order.

    Args:
        tensors: all of them.
        needed: boxes by tensor; without an entry, here or in `live`, a tensor is wanted whole.
        live: boxes that go into live parameters, by tensor.
        offsets: [n] where each whole tensor of the others goes, contiguous.
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
    strides = tensors.strides_bytes[table.tensor]
    offset = offsets[table.tensor] + (table.start * strides).sum(axis=1)
    offset[rows] = [box.address for box in placed]
    strides[rows] = _aligned([box.strides_bytes for box in placed], tensors.axes, 0)
    return TargetTable(boxes=table, offset=offset, strides_bytes=strides)


def volumes(shape: Column) -> Column:
    """[n] elements of [n, axes] shapes."""
    product: Column = shape.prod(axis=1)
    return product


def contiguous_strides(shape: Column, itemsize: Column) -> Column:
    """[n, axes] bytes between neighbours of contiguous boxes."""
    inner = np.concatenate([shape[:, 1:], itemsize[:, None]], axis=1)
    strides: Column = inner[:, ::-1].cumprod(axis=1)[:, ::-1]
    return strides


def _read(
    source: int, manifest: SourceManifest, tensors: TensorTable
) -> tuple[npt.NDArray[Any], ...]:
    boxes, regions = manifest.boxes, manifest.regions
    names = manifest.tensors.names
    here = np.fromiter(map(tensors.number.get, names, repeat(-1)), np.int64, len(names))
    number = here[numbers(boxes.tensors)]
    rows = np.flatnonzero(number >= 0)
    region = numbers(boxes.regions)[rows]
    address = numbers(regions.addresses)[region] + numbers(boxes.offsets_bytes)[rows]

    def table(column: bytes, fill: int) -> Column:
        return _widened(manifest.table(column)[rows], tensors.axes, fill)

    return (
        number[rows],
        table(boxes.starts, 0),
        table(boxes.shapes, 1),
        np.full(len(rows), source, np.int64),
        numbers(regions.devices)[region],
        address.astype(np.uint64),
        table(boxes.strides_bytes, 0),
    )


def _widened(table: Column, axes: int, fill: int) -> Column:
    """The last `axes` columns of a table, or more of `fill` in front of it."""
    missing = max(axes - table.shape[1], 0)
    front = np.full((len(table), missing), fill, np.int64)
    return np.concatenate([front, table[:, table.shape[1] + missing - axes :]], axis=1)


def _nothing(axes: int) -> tuple[npt.NDArray[Any], ...]:
    row, table = np.empty(0, np.int64), np.empty((0, axes), np.int64)
    return row, table, table, row, row, np.empty(0, np.uint64), table


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


def _first_rows(boxes: BoxTable) -> Column:
    """Rows where another box begins, and the end."""
    same = np.ones(max(len(boxes) - 1, 0), np.bool_)
    for column in (boxes.tensor[:, None], boxes.start, boxes.shape):
        same &= (column[1:] == column[:-1]).all(axis=1)
    begins = np.concatenate([np.ones(min(len(boxes), 1), np.bool_), ~same])
    return np.append(np.flatnonzero(begins), len(boxes))


def _not_covered(distinct: BoxTable, tensors: TensorTable) -> list[int]:
    """Tensors that distinct boxes do not give exactly once, or may not."""
    inside = (distinct.start >= 0) & (distinct.shape >= 0)
    inside &= distinct.start + distinct.shape <= tensors.shape[distinct.tensor]
    covered = np.zeros(len(tensors.tensors), np.int64)
    np.add.at(covered, distinct.tensor, volumes(distinct.shape))
    wrong = covered != volumes(tensors.shape)
    wrong[distinct.tensor[~inside.all(axis=1)]] = True
    pieces = np.bincount(distinct.tensor, minlength=len(wrong))
    wrong |= pieces > _MOST_PAIRS
    for apart in range(1, min(int(pieces.max(initial=0)), _MOST_PAIRS)):
        rows = np.flatnonzero(distinct.tensor[apart:] == distinct.tensor[:-apart])
        one, other = distinct[rows], distinct[rows + apart]
        meet = (one.start < other.start + other.shape) & (other.start < one.start + one.shape)
        wrong[one.tensor[meet.all(axis=1)]] = True
    return [int(number) for number in np.flatnonzero(wrong)]


def _offers_of(name: str, manifests: Sequence[SourceManifest]) -> list[tuple[str, Interval]]:
    """Every box of a tensor, and the process that offers it."""
    found: list[tuple[str, Interval]] = []
    for manifest in manifests:
        if name in manifest.tensors.names:
            tensor = manifest.tensors.names.index(name)
            rows = np.flatnonzero(numbers(manifest.boxes.tensors) == tensor)
            boxes = map(manifest.box, rows.tolist())
            found += [(manifest.source, (box.start, box.shape)) for box in boxes]
    return found
