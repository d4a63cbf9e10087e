"""Placements: a box of a logical (HF-named) tensor and the memory that holds it.

Every sharding is said in these terms. Fused QKV, gate/up pairs, padded vocabularies,
tensor and pipeline parallelism are only boxes; nothing downstream knows their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch

from engine_plugins.errors import PlanError, SourceError

__all__ = ["Interval", "SourceBox", "assemble", "check_exact_coverage"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceBox:
    """A half-open box of one HF tensor, and the view of trainer memory that holds it.

    Attributes:
        name: the tensor's name in the HF checkpoint.
        global_shape: shape of the whole HF tensor, in elements.
        start: first index of the box on every axis, in elements.
        data: view of the trainer's own memory with the box's shape; any strides. It is
            never a copy: what the trainer writes later is what a receiver will read.
        made: `data` is a copy all the same, because no view of the trainer's memory holds what the
            HF tensor does; whoever gives boxes fills it anew for every update.

    Raises:
        SourceError: the box does not lie inside the tensor.
    """

    name: str
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    data: torch.Tensor
    made: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.data.shape)
        if not _inside(self.start, shape, self.global_shape):
            raise SourceError(
                f"{self.name}: the box at {self.start} of shape {shape} does not lie inside the "
                f"tensor's shape {self.global_shape}",
                remedy="check the shard's coordinates and the model config",
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the box, in elements."""
        return tuple(self.data.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index into the whole tensor."""
        return tuple(
            slice(first, first + extent)
            for first, extent in zip(self.start, self.shape, strict=True)
        )


Interval = tuple[tuple[int, ...], tuple[int, ...]]
"""A box of a tensor: its first index and its shape on every axis, in elements."""


def check_exact_coverage(name: str, shape: Sequence[int], boxes: Iterable[Interval]) -> None:
    """Check that distinct boxes of one tensor cover each of its elements exactly once.

    Args:
        name: the tensor's name, for the message.
        shape: the whole tensor's shape.
        boxes: (start, shape) of every box; equal boxes count once (replicas), empty ones
            not at all.

    Raises:
        PlanError: a gap, an overlap or a box outside; the text names tensor and boxes.
    """
    distinct = sorted({box for box in boxes if prod(box[1])})
    for start, extent in distinct:
        if not _inside(start, extent, shape):
            raise PlanError(
                f"{name}: the box {_say(start, extent)} does not lie inside the tensor's shape "
                f"{tuple(shape)}",
                remedy="check the shard's coordinates and the model config",
            )
    _refuse_overlaps(name, distinct)
    covered = sum(prod(extent) for _, extent in distinct)
    if covered != prod(shape):
        raise PlanError(
            f"{name}: the sources give {covered} of {prod(shape)} elements of shape "
            f"{tuple(shape)}; boxes: {', '.join(_say(*box) for box in distinct[:8])}",
            remedy="publish the shards of every trainer rank",
        )


def _refuse_overlaps(name: str, distinct: Sequence[Interval]) -> None:
    """Sweep along the axis that is cut most, so that one axis of shards costs linear time."""
    cuts = [len(set(places)) for places in zip(*(start for start, _ in distinct), strict=True)]
    if not cuts:
        return
    axis = cuts.index(max(cuts))
    swept = sorted(distinct, key=lambda box: box[0][axis])
    for index, (start, extent) in enumerate(swept):
        for later in range(index + 1, len(swept)):
            other_start, other_extent = swept[later]
            if other_start[axis] >= start[axis] + extent[axis]:
                break
            if _overlap(start, extent, other_start, other_extent):
                raise PlanError(
                    f"{name}: the boxes {_say(start, extent)} and "
                    f"{_say(other_start, other_extent)} overlap without being equal",
                    remedy="each element must come from one shard, or from equal replicas",
                )


def assemble(boxes: Iterable[SourceBox]) -> dict[str, torch.Tensor]:
    """Rebuild whole HF tensors from boxes: the reference for every faster path.

    Returns:
        A new contiguous tensor per name, in the boxes' dtype.

    Raises:
        PlanError: a gap, an overlap, or ranks that disagree about a shape or dtype.
    """
    by_name: dict[str, list[SourceBox]] = {}
    for box in boxes:
        by_name.setdefault(box.name, []).append(box)
    whole: dict[str, torch.Tensor] = {}
    for name, group in by_name.items():
        kinds = {(box.global_shape, box.data.dtype) for box in group}
        if len(kinds) > 1:
            raise PlanError(
                f"{name}: ranks disagree about shape or dtype: {sorted(map(str, kinds))}",
                remedy="publish every rank of one model, in one dtype",
            )
        shape, dtype = kinds.pop()
        check_exact_coverage(name, shape, [(box.start, box.shape) for box in group])
        whole[name] = torch.empty(shape, dtype=dtype)
        for box in group:
            whole[name][box.slices] = box.data
    return whole


def _inside(start: Sequence[int], extent: Sequence[int], whole: Sequence[int]) -> bool:
    return len(start) == len(extent) == len(whole) and all(
        0 <= first and 0 <= size and first + size <= limit
        for first, size, limit in zip(start, extent, whole, strict=True)
    )


def _overlap(
    start: tuple[int, ...],
    extent: tuple[int, ...],
    other_start: tuple[int, ...],
    other_extent: tuple[int, ...],
) -> bool:
    return all(
        first < other + other_size and other < first + size
        for first, size, other, other_size in zip(
            start, extent, other_start, other_extent, strict=True
        )
    )


def _say(start: tuple[int, ...], extent: tuple[int, ...]) -> str:
    if len(start) != len(extent):
        return f"at {start} of shape {extent}"
    return "[" + ", ".join(f"{a}:{a + n}" for a, n in zip(start, extent, strict=True)) + "]"
