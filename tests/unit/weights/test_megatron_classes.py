"""The class of a parameter's module says how it is cut; one that nobody knows is an error."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from engine_plugins.errors import SourceError
from engine_plugins.weights.boxes.placement import assemble
from engine_plugins.weights.sources.megatron.classes import class_name, cut_of
from engine_plugins.weights.sources.megatron.layout import Cut
from engine_plugins.weights.sources.megatron.source import (
    MegatronChunk,
    MegatronRank,
    megatron_boxes,
)
from tests.support.megatron_hf import hf_tensors, moe_config
from tests.support.megatron_shards import megatron_ranks

BRIDGE = "megatron.bridge.models.conversion.param_mapping"
HELPERS = Path(__file__).parents[2] / "fixtures/megatron/helpers/helpers.json"
NO_PARAMETERS_OF_OURS = {
    "DotProductAttention",
    "Gemma3TEDotProductAttention",
    "IdentityOp",
    "TEDotProductAttention",
}


def test_every_class_of_bridges_registry_is_cut_as_there() -> None:
    """What Megatron-Bridge 0.3.1 had registered after importing all its models."""
    registry = json.loads(HELPERS.read_text())["module_type_registry_after_importing_all_models"]
    for cut, kinds in registry.items():
        for kind in set(kinds) - NO_PARAMETERS_OF_OURS:
            assert cut_of(kind, "x.weight", {}) is Cut(cut), kind


@pytest.mark.parametrize(
    ("kind", "leaf", "cut"),
    [
        ("TELayerNormColumnParallelLinear", "layer_norm_weight", Cut.REPLICATED),
        ("TELayerNormColumnParallelLinear", "bias", Cut.COLUMN),
        ("TERowParallelLinear", "bias", Cut.REPLICATED),
        ("TERowParallelLinear", "weight", Cut.ROW),
        ("InferenceColumnParallelLinear", "weight", Cut.COLUMN),
        ("QuantRowParallelLinear", "weight", Cut.ROW),
        ("MyRMSNorm", "weight", Cut.REPLICATED),
        ("GroupedMLP", "weight1", None),
    ],
)
def test_class_and_leaf_say_the_cut(kind: str, leaf: str, cut: Cut | None) -> None:
    """A fused norm and the bias after a row-parallel sum are whole on every rank."""
    assert cut_of(kind, f"decoder.layers.0.mlp.{leaf}", {}) is cut


def test_bridges_registry_is_asked_where_the_trainer_uses_bridge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the trainer registers there for its own modules counts."""
    bridge = ModuleType(BRIDGE)
    bridge.__dict__["AutoMapping"] = type(
        "AutoMapping", (), {"_MODULE_TYPE_REGISTRY": {"column": {"MyLinear"}, "row": set()}}
    )
    monkeypatch.setitem(sys.modules, BRIDGE, bridge)
    assert cut_of("MyLinear", "x.weight", {}) is Cut.COLUMN
    assert cut_of("MyLinear", "x.weight", {"MyLinear": "row"}) is Cut.ROW


def named(kind: str, *bases: type[nn.Module], **attributes: object) -> nn.Module:
    module: nn.Module = type(kind, bases or (nn.Module,), attributes)()
    return module


def test_a_subclass_is_cut_as_the_megatron_class_that_it_extends() -> None:
    base = type(named("RowParallelLinear"))
    assert class_name(named("MyLinear", base)) == "RowParallelLinear"
    assert class_name(named("MyLinear")) == "MyLinear"


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("column", "TEColumnParallelLinear"),
        ("row", "TERowParallelLinear"),
        ("duplicated", "TELinear"),
        (None, "TELinear"),
    ],
)
def test_a_plain_te_linear_is_cut_by_its_parallel_mode(mode: str | None, kind: str) -> None:
    assert class_name(named("TELinear", parallel_mode=mode)) == kind
    assert cut_of("TELinear", "x.weight", {}) is Cut.REPLICATED


DOWN = "decoder.layers.0.self_attention.linear_q_down_proj.weight"


def mla_ranks(kind: str, *, cut: bool) -> tuple[list[MegatronRank], dict[str, torch.Tensor]]:
    """Two tensor-parallel ranks whose q down-projection is of a class, and cut or not."""
    config = moe_config("deepseek_v3", num_hidden_layers=1)
    hf = hf_tensors(config)
    ranks = []
    for rank in megatron_ranks(hf, config, tp_size=2):
        (chunk,) = rank.chunks
        whole = chunk.tensors[DOWN]
        share = whole.chunk(2)[rank.tp_rank].clone() if cut else whole
        new = MegatronChunk(
            tensors=dict(chunk.tensors) | {DOWN: share},
            global_layers=chunk.global_layers,
            classes={DOWN: kind},
        )
        ranks.append(replace(rank, chunks=[new]))
    return ranks, hf


@pytest.mark.parametrize(("kind", "cut"), [("TELinear", False), ("ColumnParallelLinear", True)])
def test_one_name_is_cut_as_its_module_does(kind: str, cut: bool) -> None:
    """MLA's down-projections: whole with Transformer Engine's linear, column-parallel without."""
    ranks, hf = mla_ranks(kind, cut=cut)
    config = moe_config("deepseek_v3", num_hidden_layers=1)
    rebuilt = assemble(box for rank in ranks for box in megatron_boxes(rank, config))
    name = "model.layers.0.self_attn.q_a_proj.weight"
    assert torch.equal(rebuilt[name], hf[name])


def test_an_unknown_class_is_an_error_that_says_how_to_tell() -> None:
    """Not even where there is one rank: a class of one's own may order its rows otherwise."""
    ranks, _ = mla_ranks("MyLinear", cut=True)
    config = moe_config("deepseek_v3", num_hidden_layers=1)
    with pytest.raises(SourceError, match=f"tp 1/2.*class MyLinear is unknown.*{DOWN}") as error:
        megatron_boxes(ranks[1], config)
    assert "class_cuts={'MyLinear': 'column'" in error.value.remedy
    told = replace(ranks[1], class_cuts={"MyLinear": "column"})
    assert megatron_boxes(told, config)
    with pytest.raises(SourceError, match="class_cuts says 'sideways' of MyLinear"):
        megatron_boxes(replace(ranks[1], class_cuts={"MyLinear": "sideways"}), config)


def test_a_class_that_contradicts_the_name_is_an_error() -> None:
    """Gate and up in one parameter cannot be cut on the other axis."""
    config = moe_config()
    (rank,) = megatron_ranks(hf_tensors(config), config)
    name = "decoder.layers.0.mlp.experts.linear_fc1.weight0"
    chunk = replace(rank.chunks[0], classes={name: "TERowParallelGroupedLinear"})
    with pytest.raises(SourceError, match=f"{name}: a TERowParallelGroupedLinear is cut as row"):
        megatron_boxes(replace(rank, chunks=[chunk]), config)
