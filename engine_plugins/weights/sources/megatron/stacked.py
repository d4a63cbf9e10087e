"""Experts that HF holds in one tensor for all of them, the other way round.

GPT-OSS: `gate_up_proj` is [experts, hidden, 2 x ffn] with gate and up by turns, `down_proj`
[experts, ffn, hidden]; their biases likewise. Megatron has each expert's `[gate; up]` and `down`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine_plugins.errors import UnsupportedError
from engine_plugins.weights.sources.megatron.layout import Cut, Piece, Shape, Shard

__all__ = ["stacked_gated", "stacked_plain"]


def stacked_plain(shard: Shard, cut: Cut, wholes: Sequence[Shape], expert: int) -> list[Piece]:
    """A down projection, [hidden, ffn] of [experts, ffn, hidden], or a bias of one: a view.

    Raises:
        SourceError: a shard of another shape.
    """
    ((_, *whole),) = wholes
    if len(whole) == 1:
        shard.expect((whole[0],))
        return [Piece(part=0, start=(expert, 0), data=shard.data[None])]
    rows, hidden = whole
    first, last = shard.share(rows, "rows") if cut is Cut.ROW else (0, rows)
    shard.expect((hidden, last - first))
    return [Piece(part=0, start=(expert, first, 0), data=shard.data.t()[None])]


def stacked_gated(shard: Shard, wholes: Sequence[Shape], expert: int) -> Piece:
    """Gate and up, [2 x ffn, hidden] of [experts, hidden, 2 x ffn], or their biases.

    Returns:
        A piece whose data has gate and up as an axis of its own, the last: the box's shape is what
        the last two axes are together, and no view can have it.

    Raises:
        SourceError: a shard of another shape.
        UnsupportedError: gate and up by turns in Megatron as well.
    """
    if shard.glu_interleave:
        raise UnsupportedError(
            f"{shard.name}: moe_mlp_glu_interleave_size is not followed for experts that the HF "
            "model holds in one tensor",
            remedy="train without it",
        )
    ((_, *rest, columns),) = wholes
    first, last = shard.share(columns, "columns")
    shard.expect((last - first, *rest))
    halves: torch.Tensor = shard.data.unflatten(0, (2, -1))
    turned = halves.permute(*range(halves.ndim - 1, -1, -1))
    return Piece(part=0, start=(expert, *(0 for _ in rest), first), data=turned[None])
