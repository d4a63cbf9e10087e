"""How much of a receive buffer each tensor gets: the box that a rank needs of it, not the whole.

A loader is given a tensor of the whole shape and reads one box of it. Laid out with the box's own
strides, the view of the whole shape reaches past the box's place on both sides, into memory that
nothing reads or writes; so a rank of eight has an eighth of the buffer.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import Interval
from engine_plugins.weights.planning.box_table import (
    Column,
    TensorTable,
    contiguous_strides,
    volumes,
)

__all__ = ["Places", "place_sizes", "places_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Of tensors by number, what each has in a receive buffer.

    Attributes:
        nbytes: [n] of each place.
        origin: [n] bytes from the place's start to where the tensor's first element would lie: 0,
            or less where the box begins later.
        strides_bytes: [n, axes] of the tensor there.
        span: [n] bytes from where its first element would lie to where its last one would end.
    """

    nbytes: Column
    origin: Column
    strides_bytes: Column
    span: Column


def places_of(
    tensors: TensorTable,
    needed: Mapping[str, Sequence[Interval]],
    strided: Container[str] | None,
) -> Places:
    """Give each tensor a place.

    Args:
        tensors: all of them.
        needed: boxes that are fetched, by tensor; without an entry all of it is.
        strided: tensors that the loader reads alike when their strides are not those of a
            contiguous tensor. Others get whole rows, so that they look contiguous. None: every
            tensor has the place of the whole.
    """
    if strided is None:
        return Places(
            nbytes=tensors.nbytes,
            origin=np.zeros(len(tensors.tensors), np.int64),
            strides_bytes=tensors.strides_bytes,
            span=tensors.nbytes,
        )
    start, shape = np.zeros_like(tensors.shape), tensors.shape.copy()
    for number, tensor in enumerate(tensors.tensors):
        boxes = needed.get(tensor.name)
        if not boxes or not tensor.shape:
            continue
        first, extent = _hull(boxes)
        if tensor.name not in strided:
            first, extent = (first[0], *[0] * (len(first) - 1)), (extent[0], *tensor.shape[1:])
        start[number, -len(first) :] = first
        shape[number, -len(first) :] = extent
    strides = contiguous_strides(shape, tensors.itemsize)
    return Places(
        nbytes=volumes(shape) * tensors.itemsize,
        origin=-(start * strides).sum(axis=1),
        strides_bytes=strides,
        span=((tensors.shape - 1) * strides).sum(axis=1) + tensors.itemsize,
    )


def place_sizes(
    tensors: Sequence[LogicalTensor],
    needed: Mapping[str, Sequence[Interval]],
    strided: Container[str] | None,
) -> dict[str, int]:
    """Bytes of each tensor's place, by name."""
    sizes = places_of(TensorTable(tensors), needed, strided).nbytes.tolist()
    return {tensor.name: size for tensor, size in zip(tensors, sizes, strict=True)}


def _hull(boxes: Sequence[Interval]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The smallest box around some, as first index and extent."""
    if len(boxes) == 1:
        return boxes[0]
    first = [min(starts) for starts in zip(*(start for start, _ in boxes), strict=True)]
    ends = zip(*([a + n for a, n in zip(*box, strict=True)] for box in boxes), strict=True)
    return tuple(first), tuple(max(end) - a for a, end in zip(first, ends, strict=True))
