"""Fused QKV rows against vectors of Megatron-Bridge's own split and merge, gates and biases too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_plugins.errors import SourceError
from engine_plugins.weights.boxes.placement import SourceBox, assemble
from engine_plugins.weights.sources.megatron.layout import (
    Cut,
    Heads,
    Rows,
    Shard,
    cut_shard,
    with_output_gate,
)
from tests.support.megatron_fixtures import read_safetensors

HELPERS = Path(__file__).parents[2] / "fixtures/megatron/helpers"
VECTORS = json.loads((HELPERS / "helpers.json").read_text())["qkv"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
@pytest.mark.parametrize("bias", ["", "b"], ids=["weight", "bias"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_shards_split_as_bridge_splits_the_whole(
    vector: dict[str, Any], bias: str, count: int
) -> None:
    """The gate is found by the rows alone; slices may end inside a group, or inside a head."""
    tensors = read_safetensors(HELPERS / "qkv.safetensors")
    fused, *parts = (tensors[f"{vector['name']}/{part}{bias}"] for part in ("qkv", "q", "k", "v"))
    heads = Heads(heads=vector["num_attention_heads"], groups=vector["num_query_groups"])
    rest = tuple(fused.shape[1:])
    rows = (heads.heads * vector["kv_channels"], *[heads.groups * vector["kv_channels"]] * 2)
    boxes = []
    for index, slice_ in enumerate(fused.chunk(count)):
        shard = Shard(name="linear_qkv", data=slice_, index=index, count=count)
        wholes = with_output_gate(shard, [(n, *rest) for n in rows])
        boxes += [
            SourceBox(
                name="qkv"[piece.part],
                global_shape=wholes[piece.part],
                start=piece.start,
                data=piece.data,
            )
            for piece in cut_shard(Rows.QKV, Cut.COLUMN, shard, wholes, heads)
        ]
    for part, rebuilt in zip(parts, map(assemble(boxes).get, "qkv"), strict=True):
        assert rebuilt is not None
        assert torch.equal(rebuilt, part)


def test_rows_that_are_neither_with_nor_without_a_gate_are_an_error() -> None:
    shard = Shard(name="linear_qkv", data=torch.zeros(9, 2), index=0, count=1)
    wholes = with_output_gate(shard, [(4, 2), (2, 2), (2, 2)])
    with pytest.raises(SourceError, match=r"linear_qkv: shard 0 of 1 has shape \(9, 2\)"):
        cut_shard(Rows.QKV, Cut.COLUMN, shard, wholes, Heads(heads=2, groups=1))
