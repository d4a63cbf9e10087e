"""What all sources hold of the tensors that a rank wants, each different box once.

Ranks of one kind publish the same columns: data parallel replicas the same boxes, at other
addresses. So columns that are equal are read once, and who offers a box and where it lies is looked
up for the boxes alone that a rank fetches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine_plugins.errors import PlanError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import Interval, check_exact_coverage
from engine_plugins.weights.contract.manifest import SourceManifest, numbers
from engine_plugins.weights.planning.box_table import (
    BoxTable,
    Column,
    TensorTable,
    every,
    gathered,
    volumes,
)
from engine_plugins.weights.planning.distinct import by_tensors
from engine_plugins.weights.planning.exact_cover import not_told_apart, sums_by_tensor

__all__ = ["Memory", "Replicas", "SourceTable", "ranges", "source_table"]

_SHOWN = 8


class Replicas(NamedTuple):
    """Who offers some boxes: those of box `i` are `first[i]` to `first[i + 1]`."""

    first: Column
    source: Column
    """Number of the manifest, ascending within a box."""
    row: Column
    """Of the box in that manifest."""


class Memory(NamedTuple):
    """Where boxes lie: [n] device, [n] uint64 address of the first element, [n, axes] strides."""

    device: Column
    address: npt.NDArray[np.uint64]
    strides_bytes: Column


class _Layouts(NamedTuple):
    """The different ways in which manifests name boxes, and who has each of them."""

    boxes: BoxTable
    """Of all layouts that the plan's tensors have, those without elements left out."""
    layout: Column
    """[n] of each box."""
    row: Column
    """[n] of each box in its layout's manifests."""
    first: Column
    """[layouts + 1] where each one's manifests begin."""
    source: Column
    """Numbers of the manifests, by layout."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceTable:
    """Every different box once, with what it takes to find out who offers it.

    Attributes:
        distinct: [m] boxes, by tensor and then by their start.
        first: [m + 1] where each box's entries begin.
        layout, row: [n] of each entry: a way to name boxes, and the box's row there.
        begin: [layouts + 1] where the holders of each of those ways begin.
        holders: numbers of the manifests that have them.
        manifests: the sources, by number.
    """

    distinct: BoxTable
    first: Column
    layout: Column
    row: Column
    begin: Column
    holders: Column
    manifests: Sequence[SourceManifest]

    def replicas(self, boxes: Column) -> Replicas:
        """All who offer these distinct boxes, [n] by number."""
        counts = self.first[boxes + 1] - self.first[boxes]
        entry = ranges(self.first[boxes], counts)
        layout = self.layout[entry]
        begin = self.begin[layout]
        sizes = self.begin[layout + 1] - begin
        if len(entry) == len(boxes) and (sizes == 1).all():  # as in most jobs: nobody has a replica
            one = np.arange(len(boxes) + 1)
            return Replicas(one, self.holders[begin], self.row[entry])
        of = np.repeat(np.repeat(np.arange(len(boxes)), counts), sizes)
        source = self.holders[ranges(begin, sizes)]
        row = np.repeat(self.row[entry], sizes)
        if len(entry) > len(boxes):  # of one layout alone they are in order
            order = np.lexsort((source, of))
            source, row = source[order], row[order]
        first = np.concatenate([[0], np.bincount(of, minlength=len(boxes)).cumsum()])
        return Replicas(first, source, row)

    def memory(self, source: Column, row: Column, axes: int) -> Memory:
        """Where [n] boxes lie, each given by its source and its row there."""
        device = np.empty(len(source), np.int64)
        address = np.empty(len(source), np.uint64)
        strides = np.empty((len(source), axes), np.int64)
        # Numbers of 16 bits are sorted by their digits, which takes no comparison.
        order = np.argsort(source.astype(np.uint16), kind="stable")
        ends = np.cumsum(np.bincount(source, minlength=1))
        for number in np.flatnonzero(np.diff(ends, prepend=0)).tolist():
            manifest = self.manifests[number]
            mine = order[ends[number - 1] if number else 0 : ends[number]]
            boxes, regions, rows = manifest.boxes, manifest.regions, row[mine]
            region = numbers(boxes.regions)[rows]
            device[mine] = numbers(regions.devices)[region]
            offset = numbers(boxes.offsets_bytes)[rows]
            address[mine] = (numbers(regions.addresses)[region] + offset).astype(np.uint64)
            strides[mine] = _widened(gathered(manifest.table(boxes.strides_bytes), rows), axes, 0)
        return Memory(device, address, strides)


def source_table(manifests: Sequence[SourceManifest], tensors: TensorTable) -> SourceTable:
    """Read the manifests' columns; boxes of other tensors are left out, and empty ones.

    Raises:
        PlanError: a gap, an overlap or a box outside; the text names tensor and boxes.
    """
    layouts = _layouts(manifests, tensors)
    boxes = layouts.boxes
    whole = tensors.shape[boxes.tensor]
    outside = ((boxes.start < 0) | (boxes.shape > whole - boxes.start)).any(axis=1)
    elements = np.concatenate([[0], volumes(tensors.shape).cumsum()])
    index = (boxes.start * (tensors.strides_bytes // tensors.itemsize[:, None])[boxes.tensor]).sum(
        1
    )
    # By this number boxes come by tensor and then by start.
    place = elements[boxes.tensor] + index
    order = np.argsort(place, kind="stable")
    place, shape = place[order], boxes.shape[order]
    begins = np.ones(len(order), np.bool_)
    begins[1:] = place[1:] != place[:-1]
    alike = every(shape[1:] == shape[:-1])
    clash = np.flatnonzero(~begins[1:] & ~alike)
    first = np.append(np.flatnonzero(begins), len(order))
    distinct = boxes[order[first[:-1]]]
    table = SourceTable(
        distinct=distinct,
        first=first,
        layout=layouts.layout[order],
        row=layouts.row[order],
        begin=layouts.first,
        holders=layouts.source,
        manifests=manifests,
    )
    given = sums_by_tensor(distinct.tensor, volumes(distinct.shape), len(tensors.tensors))
    wrong = given != volumes(tensors.shape)
    wrong[boxes.tensor[outside]] = True
    wrong[boxes.tensor[order[clash]]] = True
    for number in not_told_apart(distinct).tolist():
        wrong[number] = wrong[number] or _overlap(distinct, number, tensors)
    for number in np.flatnonzero(wrong).tolist():
        _refuse(tensors.tensors[number], manifests)
    return table


def ranges(first: Column, counts: Column) -> Column:
    """All of `first[i], first[i] + 1, ...`, `counts[i]` of them, one after another."""
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    numbers_of: Column = np.arange(total) + np.repeat(first - ends + counts, counts)
    return numbers_of


def _layouts(manifests: Sequence[SourceManifest], tensors: TensorTable) -> _Layouts:
    """Read each different set of columns once."""
    speakers, tensors_of = by_tensors(manifests)
    lookup = tensors.number.get
    numbered = [
        np.fromiter(map(lookup, names, repeat(-1)), np.int64, len(names))
        for names in (each.tensors.names for each in speakers)
    ]
    known: dict[tuple[int, bytes, bytes, bytes], int] = {}
    layout_of: list[int] = []
    parts: list[tuple[Column, Column, Column, Column]] = []
    for manifest, number in zip(manifests, tensors_of, strict=True):
        boxes = manifest.boxes
        key = (number, boxes.tensors, boxes.starts, boxes.shapes)
        layout = known.setdefault(key, len(known))
        layout_of.append(layout)
        if layout == len(parts):
            parts.append(_read(manifest, numbered[number], tensors.axes))
    empty = np.empty(0, np.int64)
    table = np.empty((0, tensors.axes), np.int64)
    tensor, start, shape, row = (
        np.concatenate(each) for each in zip((empty, table, table, empty), *parts, strict=True)
    )
    counts = np.array([len(part[0]) for part in parts], np.int64)
    of = np.array(layout_of, np.int64)
    return _Layouts(
        boxes=BoxTable(tensor=tensor, start=start, shape=shape),
        layout=np.repeat(np.arange(len(parts)), counts),
        row=row,
        first=np.concatenate([[0], np.bincount(of, minlength=len(parts)).cumsum()]),
        source=np.argsort(of, kind="stable"),
    )


def _read(
    manifest: SourceManifest, numbered: Column, axes: int
) -> tuple[Column, Column, Column, Column]:
    """The boxes of wanted tensors that have elements: tensor, start, shape, row."""
    tensor = numbered[numbers(manifest.boxes.tensors)]
    shape = manifest.table(manifest.boxes.shapes)
    rows = np.flatnonzero((tensor >= 0) & every(shape != 0))
    start = manifest.table(manifest.boxes.starts)
    if len(rows) < len(tensor):
        tensor, start, shape = tensor[rows], gathered(start, rows), gathered(shape, rows)
    return tensor, _widened(start, axes, 0), _widened(shape, axes, 1), rows


def _widened(table: Column, axes: int, fill: int) -> Column:
    """The last `axes` columns of a table, or more of `fill` in front of it."""
    missing = axes - table.shape[1]
    if missing <= 0:
        return table[:, -missing:]
    front = np.full((len(table), missing), fill, np.int64)
    return np.concatenate([front, table], axis=1)


def _overlap(distinct: BoxTable, number: int, tensors: TensorTable) -> bool:
    """Whether a tensor's boxes overlap, by looking at one after another."""
    rows = slice(*np.searchsorted(distinct.tensor, [number, number + 1]).tolist())
    own = slice(tensors.axes - int(tensors.ndim[number]), None)
    boxes = (map(tuple, table[rows, own].tolist()) for table in (distinct.start, distinct.shape))
    tensor = tensors.tensors[number]
    try:
        check_exact_coverage(tensor.name, tensor.shape, zip(*boxes, strict=True))
    except PlanError:
        return True
    return False


def _refuse(tensor: LogicalTensor, manifests: Sequence[SourceManifest]) -> None:
    """Say what is wrong with the boxes of a tensor.

    Raises:
        PlanError: they do not give each of its elements once.
    """
    offers = _offers_of(tensor.name, manifests)
    try:
        check_exact_coverage(tensor.name, tensor.shape, [box for _, box in offers])
    except PlanError as error:
        said = [f"{who} offers {shape} at {start}" for who, (start, shape) in offers[:_SHOWN]]
        error.message += "; " + ", ".join(said or ["nobody offers it"])
        raise


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
