"""Which part of which source's memory gives each needed element, all tensors at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine_plugins.weights.planning.box_table import (
    BoxTable,
    Column,
    SourceTable,
    TargetTable,
    TensorTable,
    volumes,
)
from engine_plugins.weights.planning.source_choice import SourceChoice, balanced

__all__ = ["Parts", "intersect", "runs"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Boxes that each lie in one needed box and in one source's box, in the needed boxes' order.

    Attributes:
        boxes: [n] of them.
        offer: [n] row of the source's box in its table.
        address: [n] uint64, of the part's first element.
        strides_bytes: [n, axes] of the part in the source's memory.
        target: [n] where its first element goes, as `TargetTable.offset` says it.
        target_strides: [n, axes] of the part where it goes.
        nbytes: [n].
    """

    boxes: BoxTable
    offer: Column
    address: npt.NDArray[np.uint64]
    strides_bytes: Column
    target: Column
    target_strides: Column
    nbytes: Column


def intersect(
    needed: TargetTable,
    sources: SourceTable,
    tensors: TensorTable,
    choice: SourceChoice | None = None,
) -> Parts:
    """Cut the needed boxes along the sources' and choose among replicas, evenly if not told how.

    Raises:
        PlanError: the choice finds no source within reach; the text names tensor and rank.
    """
    distinct, whole = sources.distinct, needed.boxes
    low = np.searchsorted(distinct.tensor, whole.tensor, side="left")
    counts = np.searchsorted(distinct.tensor, whole.tensor, side="right") - low
    wanted = np.repeat(np.arange(len(whole)), counts)
    given = np.arange(len(wanted)) + np.repeat(low - counts.cumsum() + counts, counts)
    start = np.maximum(whole.start[wanted], distinct.start[given])
    end = np.minimum(
        whole.start[wanted] + whole.shape[wanted], distinct.start[given] + distinct.shape[given]
    )
    meet = (end > start).all(axis=1)
    boxes = BoxTable(tensor=whole.tensor[wanted], start=start, shape=end - start)[meet]
    nbytes = volumes(boxes.shape) * tensors.itemsize[boxes.tensor]
    if choice is None:
        offer = balanced(sources.first, sources.source, given[meet], nbytes)
    else:
        offer = choice.rows(sources, tensors, given[meet], nbytes)
    strides = sources.strides_bytes[offer]
    skipped = ((boxes.start - sources.boxes.start[offer]) * strides).sum(axis=1)
    wanted = wanted[meet]
    target_strides = needed.strides_bytes[wanted]
    within = ((boxes.start - whole.start[wanted]) * target_strides).sum(axis=1)
    return Parts(
        boxes=boxes,
        offer=offer,
        address=sources.address[offer] + skipped.astype(np.uint64),
        strides_bytes=strides,
        target=needed.offset[wanted] + within,
        target_strides=target_strides,
        nbytes=nbytes,
    )


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
