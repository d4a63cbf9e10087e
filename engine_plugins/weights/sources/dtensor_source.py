"""DTensors (FSDP2, HSDP, tensor parallelism) as a source: a rank's local memory as boxes.

torch cuts along the mesh axes in order, each cut as `torch.chunk` does it: early parts are full,
the last ones shorter or empty. FSDP2 over tensor parallelism on one axis is `_StridedShard`: the
axis is first cut into as many pieces as tensor parallelism has ranks, and every piece into shards.
A rank that holds several pieces of an axis offers a box for each. Nothing is gathered or copied.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, TypeGuard

import torch

from engine_plugins.errors import UnsupportedError
from engine_plugins.weights.boxes.placement import SourceBox

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["is_dtensor", "shard_boxes"]

Run = tuple[int, int]
"""First index on an axis of the whole tensor, and how many follow each other from there."""


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Say whether it is a DTensor; where nobody has imported their module, nothing is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def shard_boxes(name: str, tensor: DTensor, local: torch.Tensor) -> list[SourceBox]:
    """Place a DTensor's local tensor in the whole one.

    Ranks along a replicated mesh axis give equal boxes. A rank without elements gives an empty
    box, one outside of the mesh none.

    Args:
        name: the HF tensor's name.
        tensor: the DTensor; its shape is the whole tensor's.
        local: a view of its `to_local()`.

    Raises:
        UnsupportedError: partial sums, an unknown placement, or a local shape that torch's
            placements do not give.
    """
    if tensor.device_mesh.get_coordinate() is None:
        return []
    axes = _local_runs(name, tensor)
    shape = tuple(_length(runs) for runs in axes)
    if shape != tuple(local.shape):
        raise UnsupportedError(
            f"{name}: this rank's share of {tuple(tensor.shape)} should be {shape} by its "
            f"placements {tensor.placements}, and is {tuple(local.shape)}",
            remedy="shard as torch does (fully_shard, distribute_tensor), or offer SourceBoxes",
        )
    return [
        SourceBox(
            name=name,
            global_shape=tuple(tensor.shape),
            start=tuple(first for (first, _), _ in chosen),
            data=local[tuple(part for _, part in chosen)],
        )
        for chosen in product(*(list(_with_slices(runs)) for runs in axes))
    ]


def _local_runs(name: str, tensor: DTensor) -> list[list[Run]]:
    """Say for every axis which indices this rank holds, in their local order."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    axes: list[list[Run]] = [[(0, extent)] for extent in tensor.shape]
    for mesh_dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, (Shard, _StridedShard)):
            raise UnsupportedError(
                f"{name}: a DTensor placed {placement} on mesh axis {mesh_dim} has no values that "
                "can be read in place",
                remedy="redistribute it to Shard or Replicate before it is offered",
            )
        axes[placement.dim] = _cut(
            axes[placement.dim],
            pieces=int(placement.split_factor) if isinstance(placement, _StridedShard) else 1,
            parts=tensor.device_mesh.size(mesh_dim),
            part=tensor.device_mesh.get_local_rank(mesh_dim),
        )
    # An empty share lies at the end, where it overlaps nothing.
    return [runs or [(extent, 0)] for runs, extent in zip(axes, tensor.shape, strict=True)]


def _cut(runs: Sequence[Run], *, pieces: int, parts: int, part: int) -> list[Run]:
    """Cut an axis into pieces and each of them into parts; keep one part of every piece."""
    kept: list[Run] = []
    for piece in range(pieces):
        first, extent = _chunk((0, _length(runs)), pieces, piece)
        for run in _select(runs, _chunk((first, extent), parts, part)):
            if kept and sum(kept[-1]) == run[0]:
                run = (kept[-1][0], kept.pop()[1] + run[1])
            kept.append(run)
    return kept


def _chunk(run: Run, chunks: int, chunk: int) -> Run:
    """Give one of the chunks into which `torch.chunk` cuts a run; the last ones may be empty."""
    first, extent = run
    full = -(-extent // chunks)
    start = min(full * chunk, extent)
    return first + start, min(full, extent - start)


def _select(runs: Sequence[Run], positions: Run) -> Iterator[Run]:
    """Give what lies at some positions of runs that follow each other."""
    before = 0
    for first, extent in runs:
        start = max(positions[0], before)
        stop = min(sum(positions), before + extent)
        if start < stop:
            yield first + start - before, stop - start
        before += extent


def _with_slices(runs: Sequence[Run]) -> Iterator[tuple[Run, slice]]:
    """Add to each run where the local tensor has it."""
    before = 0
    for run in runs:
        yield run, slice(before, before + run[1])
        before += run[1]


def _length(runs: Sequence[Run]) -> int:
    return sum(extent for _, extent in runs)
