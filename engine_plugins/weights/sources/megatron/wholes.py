"""Shapes of whole HF tensors where nobody said them: what a shard and the cut make of them.

What engines want is compared with these when they connect, so a wrong cut shows there.
"""

from __future__ import annotations

from engine_plugins.errors import SourceError
from engine_plugins.weights.sources.megatron.layout import Cut, Rows, Shape, Shard
from engine_plugins.weights.sources.megatron.rules import Rule
from engine_plugins.weights.sources.megatron.sizes import Sizes

__all__ = ["wholes_of"]


def wholes_of(rule: Rule, shard: Shard, sizes: Sizes) -> list[Shape]:
    """The shape of each HF tensor of a rule that has a role and no sizes.

    Args:
        rule: of the parameter.
        shard: one rank's share of it.
        sizes: of the model, for the vocabulary and the attention heads.

    Raises:
        SourceError: a shard that such a rule cannot be of.
    """
    if rule.role is None or not shard.data.ndim:
        raise _impossible(rule, shard)
    rows, *rest = shard.data.shape
    if rule.role.cut is Cut.ROW:
        if len(rest) != 1:
            raise _impossible(rule, shard)
        return [(rows, rest[0] * shard.count)]
    rows *= shard.count
    if rule.rows is Rows.PADDED:
        return [(sizes["vocab"], *rest)]
    if rule.rows is Rows.QKV:
        return [(sizes[part], *rest) for part in ("q_rows", "kv_rows", "kv_rows")]
    if rule.rows is Rows.GATED:
        if rows % 2:
            raise _impossible(rule, shard)
        return [(rows // 2, *rest)] * 2
    return [(rows, *rest)]


def _impossible(rule: Rule, shard: Shard) -> SourceError:
    return SourceError(
        f"{shard.name}: a shard of shape {tuple(shard.data.shape)} cannot be one of "
        f"{rule.rows.value} rows for {', '.join(rule.hf)}",
        remedy="check the rule of this parameter",
    )
