"""How Megatron-Core lays a parameter out over ranks, as pieces of HF tensors.

Four shapes of cut are enough for every parameter: replicated, cut on axis 1, cut on the
padded vocabulary, and *interleaved rows* (fused QKV by query group, gate and up by rank,
plain column parallelism with one part). Nothing here knows a parameter's name.
Source of the layouts: megatron-core 0.16.1, read on CPU and confirmed by HF logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from engine_plugins.errors import SourceError

__all__ = ["Layout", "Piece", "Shard", "cut_shard"]

Shape = tuple[int, ...]


class Layout(Enum):
    """How a parameter is cut over the ranks of its parallel group."""

    IGNORED = "ignored"
    """A copy of something that another parameter publishes."""
    REPLICATED = "replicated"
    """Every rank holds the whole tensor."""
    AXIS0 = "axis0"
    """Equal contiguous row slices (column-parallel linear)."""
    AXIS1 = "axis1"
    """Equal column slices (row-parallel linear)."""
    VOCAB = "vocab"
    """Equal row slices of the vocabulary, padded at its end."""
    QKV = "qkv"
    """Rows `[q x (heads / groups), k, v]` per query group, the whole cut into equal slices.

    With fewer groups than ranks a slice begins and ends inside a group.
    """
    GATED = "gated"
    """Each rank holds its own `[gate; up]`."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's share of one native parameter.

    Attributes:
        name: the native name, for messages.
        data: view of the trainer's memory.
        index: the rank's place in the group that cuts this parameter.
        count: size of that group.
    """

    name: str
    data: torch.Tensor
    index: int
    count: int

    def expect(self, shape: Shape) -> None:
        """Raise SourceError unless the share has the shape that the config gives it."""
        if tuple(self.data.shape) != shape:
            raise SourceError(
                f"{self.name}: shard {self.index} of {self.count} has shape "
                f"{tuple(self.data.shape)}, but the model config gives {shape}",
                remedy="check the parallel sizes given and that the config is this model's",
            )

    def share(self, extent: int, what: str) -> tuple[int, int]:
        """Half-open range of this shard in an axis of `extent` elements cut equally."""
        if extent % self.count:
            raise SourceError(
                f"{self.name}: {extent} {what} cannot be cut into {self.count} equal shards",
                remedy="check the parallel sizes given and that the config is this model's",
            )
        size = extent // self.count
        return self.index * size, (self.index + 1) * size


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A box of one of a parameter's HF tensors: which, from where, and the memory."""

    part: int
    start: Shape
    data: torch.Tensor


def cut_shard(
    layout: Layout, shard: Shard, wholes: Sequence[Shape], query_groups: int
) -> list[Piece]:
    """Say which boxes of the HF tensors a shard holds.

    Args:
        layout: how the parameter is cut.
        shard: this rank's share.
        wholes: shapes of the parameter's HF tensors, in the order of the fused rows.
        query_groups: attention groups of the model, G.

    Returns:
        Views of the shard; empty where it holds vocabulary padding alone.

    Raises:
        SourceError: the shard's shape is not what the config and the coordinates give.
    """
    return _CUTS[layout](shard, wholes, query_groups)


def _cut_ignored(_shard: Shard, _wholes: Sequence[Shape], _query_groups: int) -> list[Piece]:
    return []


def _cut_replicated(shard: Shard, wholes: Sequence[Shape], _query_groups: int) -> list[Piece]:
    (whole,) = wholes
    shard.expect(whole)
    return [Piece(part=0, start=(0,) * len(whole), data=shard.data)]


def _cut_axis1(shard: Shard, wholes: Sequence[Shape], _query_groups: int) -> list[Piece]:
    ((rows, columns),) = wholes
    first, last = shard.share(columns, "columns")
    shard.expect((rows, last - first))
    return [Piece(part=0, start=(0, first), data=shard.data)]


def _cut_vocab(shard: Shard, wholes: Sequence[Shape], _query_groups: int) -> list[Piece]:
    ((vocab, *rest),) = wholes
    rows = shard.data.shape[0] if shard.data.ndim else 0
    shard.expect((rows, *rest))
    if rows * shard.count < vocab:
        raise SourceError(
            f"{shard.name}: {shard.count} shards of {rows} rows cannot hold the config's "
            f"vocabulary of {vocab}",
            remedy="check tp_size and vocab_size",
        )
    first = shard.index * rows
    kept = min(rows, vocab - first)
    if kept <= 0:
        return []
    return [Piece(part=0, start=(first, *(0 for _ in rest)), data=shard.data[:kept])]


def _cut_axis0(shard: Shard, wholes: Sequence[Shape], _query_groups: int) -> list[Piece]:
    return _cut_interleaved(shard, wholes, blocks=1)


def _cut_qkv(shard: Shard, wholes: Sequence[Shape], query_groups: int) -> list[Piece]:
    return _cut_interleaved(shard, wholes, blocks=query_groups)


def _cut_gated(shard: Shard, wholes: Sequence[Shape], _query_groups: int) -> list[Piece]:
    return _cut_interleaved(shard, wholes, blocks=shard.count)


def _cut_interleaved(shard: Shard, wholes: Sequence[Shape], *, blocks: int) -> list[Piece]:
    """Cut rows laid out as `blocks` times (a run of each part), sliced equally over ranks."""
    if any(whole[0] % blocks for whole in wholes):
        raise SourceError(
            f"{shard.name}: {[whole[0] for whole in wholes]} rows do not divide into "
            f"{blocks} equal blocks",
            remedy="check the parallel sizes given and that the config is this model's",
        )
    runs = [whole[0] // blocks for whole in wholes]
    height = sum(runs)
    first, last = shard.share(height * blocks, "fused rows")
    rest = wholes[0][1:]
    shard.expect((last - first, *rest))
    pieces = []
    for block in range(first // height, -(-last // height)):
        run_first = block * height
        for part, run in enumerate(runs):
            low, high = max(run_first, first), min(run_first + run, last)
            if low < high:
                start = (block * run + low - run_first, *(0 for _ in rest))
                pieces.append(
                    Piece(part=part, start=start, data=shard.data[low - first : high - first])
                )
            run_first += run
    return pieces


_CUTS: dict[Layout, Callable[[Shard, Sequence[Shape], int], list[Piece]]] = {
    Layout.IGNORED: _cut_ignored,
    Layout.REPLICATED: _cut_replicated,
    Layout.AXIS0: _cut_axis0,
    Layout.AXIS1: _cut_axis1,
    Layout.VOCAB: _cut_vocab,
    Layout.QKV: _cut_qkv,
    Layout.GATED: _cut_gated,
}
