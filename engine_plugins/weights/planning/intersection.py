"""Which part of which source's memory gives each needed element, all tensors at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine_plugins.weights.planning.box_table import (
    BoxTable,
    Column,
    TargetTable,
    TensorTable,
    every,
    gathered,
    summed,
    volumes,
)
from engine_plugins.weights.planning.source_choice import SourceChoice
from engine_plugins.weights.planning.source_table import SourceTable, ranges

__all__ = ["Parts", "intersect", "runs"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Boxes that each lie in one needed box and in one source's box, in the needed boxes' order.

    Attributes:
        boxes: [n] of them.
        offered: [n] the source's boxes that they are of.
        source, device: [n].
        offered_address: [n] uint64, of the first element of the source's box.
        address: [n] uint64, of the part's first element.
        strides_bytes: [n, axes] of the part in the source's memory.
        target: [n] where its first element goes, as `TargetTable.offset` says it.
        target_strides: [n, axes] of the part where it goes.
        nbytes: [n].
    """

    boxes: BoxTable
    offered: BoxTable
    source: Column
    device: Column
    offered_address: npt.NDArray[np.uint64]
    address: npt.NDArray[np.uint64]
    strides_bytes: Column
    target: Column
    target_strides: Column
    nbytes: Column

    def __getitem__(self, rows: Column) -> Parts:
        return Parts(
            boxes=self.boxes[rows],
            offered=self.offered[rows],
            source=self.source[rows],
            device=self.device[rows],
            offered_address=self.offered_address[rows],
            address=self.address[rows],
            strides_bytes=gathered(self.strides_bytes, rows),
            target=self.target[rows],
            target_strides=gathered(self.target_strides, rows),
            nbytes=self.nbytes[rows],
        )


def intersect(
    needed: TargetTable,
    sources: SourceTable,
    tensors: TensorTable,
    choice: SourceChoice,
) -> Parts:
    """Cut the needed boxes along the sources' and choose among replicas.

    Raises:
        PlanError: the choice finds no source within reach; the text names tensor and rank.
    """
    whole = needed.boxes
    wanted, given = _that_may_meet(whole, sources.distinct, len(tensors.tensors))
    offered = sources.distinct[given]
    within = whole[wanted]
    start = np.maximum(within.start, offered.start)
    shape = np.minimum(within.start + within.shape, offered.start + offered.shape) - start
    meet = np.flatnonzero(every(shape > 0))
    if len(meet) < len(wanted):
        wanted, given, offered = wanted[meet], given[meet], offered[meet]
        start, shape = gathered(start, meet), gathered(shape, meet)
    boxes = BoxTable(tensor=offered.tensor, start=start, shape=shape)
    nbytes = volumes(boxes.shape) * tensors.itemsize[boxes.tensor]
    source, row = choice.of(sources, tensors, given, nbytes)
    memory = sources.memory(source, row, tensors.axes)
    skipped = summed((start - offered.start) * memory.strides_bytes)
    target_strides = gathered(needed.strides_bytes, wanted)
    into = summed((start - gathered(whole.start, wanted)) * target_strides)
    return Parts(
        boxes=boxes,
        offered=offered,
        source=source,
        device=memory.device,
        offered_address=memory.address,
        address=memory.address + skipped.astype(np.uint64),
        strides_bytes=memory.strides_bytes,
        target=needed.offset[wanted] + into,
        target_strides=target_strides,
        nbytes=nbytes,
    )


def _that_may_meet(needed: BoxTable, given: BoxTable, tensors: int) -> tuple[Column, Column]:
    """Pairs of a needed and a given box of one tensor, by number: all that meet, and few others.

    Pairs come by needed box and then by given box. A tensor's given boxes are looked for along the
    axis on which they are cut most.
    """
    axis = _most_cut(given, tensors)
    each = np.arange(len(given))
    order = np.lexsort((given.start[each, axis[given.tensor]], given.tensor))
    tensor = given.tensor[order]
    along = axis[tensor]
    start, size = given.start[order, along], given.shape[order, along]
    # Tensors are moved apart, each behind all ends of the one before: one search serves all.
    first = np.flatnonzero(np.diff(tensor, prepend=-1))
    ends = np.zeros(tensors, np.int64)
    ends[tensor[first]] = np.maximum.reduceat(start + size, first) if len(first) else 0
    behind = ends.cumsum() - ends
    start += behind[tensor]
    reached = np.maximum.accumulate(start + size)
    number = needed.tensor
    rows = np.arange(len(needed))
    begin = needed.start[rows, axis[number]] + behind[number]
    end = begin + needed.shape[rows, axis[number]]
    low = np.searchsorted(reached, begin, side="right")
    high = np.searchsorted(start, np.minimum(end, (behind + ends)[number]), side="left")
    counts = np.maximum(high - low, 0)
    return np.repeat(rows, counts), order[ranges(low, counts)]


def _most_cut(given: BoxTable, tensors: int) -> Column:
    """[tensors] axis that each tensor's boxes are cut along most: where fewest begin at 0."""
    at_first = [
        np.bincount(given.tensor[given.start[:, axis] == 0], minlength=tensors)
        for axis in range(given.start.shape[1])
    ]
    axis: Column = np.argmin(at_first, axis=0)
    return axis


def runs(parts: Parts, tensors: TensorTable) -> tuple[Column, Column]:
    """Bytes that are contiguous at the source and where they go, and the axes left to walk.

    Returns:
        [n] bytes, and [n] how many leading axes have to be walked, run by run.
    """
    target = parts.target_strides
    run = tensors.itemsize[parts.boxes.tensor].copy()
    outer = np.zeros(len(run), np.int64)
    growing = np.ones(len(run), np.bool_)
    for axis in reversed(range(tensors.axes)):
        size = parts.boxes.shape[:, axis]
        same = (parts.strides_bytes[:, axis] == run) & (target[:, axis] == run)
        ends = growing & ~same & (size != 1)
        outer[ends] = axis + 1
        growing &= ~ends
        run = np.where(growing, run * size, run)
    return run, outer
