"""Shards of MoE, MLA and MTP models in any layout rebuild the HF tensors; errors name the rank."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DeepseekV3Config, Glm4MoeConfig, Qwen3MoeConfig

from engine_plugins.errors import PlanError, SourceError
from engine_plugins.weights.boxes.placement import assemble
from engine_plugins.weights.sources.megatron.source import MegatronRank, megatron_boxes
from engine_plugins.weights.sources.torch_source import hf_boxes
from tests.support.megatron_hf import hf_tensors, moe_config
from tests.support.megatron_shards import megatron_ranks


def rebuild(ranks: list[MegatronRank], config: Any) -> dict[str, torch.Tensor]:
    return assemble(box for rank in ranks for box in megatron_boxes(rank, config))


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model with experts, and a way to cut it that Megatron allows."""
    tp_size, ep_size, etp_size = (draw(st.sampled_from([1, 2, 4])) for _ in range(3))
    family = draw(st.sampled_from(["qwen3_moe", "glm4_moe", "deepseek_v3"]))
    layers = draw(st.integers(1, 4))
    edges = [0, *draw(st.lists(st.integers(0, layers), max_size=3).map(sorted)), layers]
    chunks = [list(range(a, b)) for a, b in pairwise(edges)]
    virtual = draw(st.sampled_from([v for v in (1, 2) if len(chunks) % v == 0]))
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "moe_intermediate_size": 4 * draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(1, 40)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if family == "deepseek_v3":
        changes["q_lora_rank"] = draw(st.sampled_from([None, 12]))
    else:
        changes["num_key_value_heads"] = draw(st.sampled_from([1, 2, 4, 8]))
        changes["attention_bias"] = draw(st.booleans())
        changes["attention_gate"] = draw(st.booleans())
    if family != "qwen3_moe":
        changes["first_k_dense_replace"] = draw(st.integers(0, layers))
        changes["n_shared_experts"] = draw(st.integers(1, 2))
        changes["num_nextn_predict_layers"] = draw(st.integers(0, 2))
    return moe_config(family, **changes), {
        "tp_size": tp_size,
        "ep_size": ep_size,
        "etp_size": draw(st.sampled_from([None, etp_size])),
        "stages": [chunks[n :: len(chunks) // virtual] for n in range(len(chunks) // virtual)],
        "experts": draw(st.sampled_from(["grouped", "sequential", "legacy"])),
        "local_spec": draw(st.booleans()),
        "vocab_multiple": draw(st.sampled_from([1, 8])),
        "prefix": draw(st.sampled_from(["", "module.module."])),
    }


@settings(max_examples=30, deadline=None)
@given(layouts())
def test_any_layout_rebuilds_the_hf_tensors(
    layout: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """TP x PP x VPP x EP x ETP, three expert layouts, output gates, MLA, MTP, all together."""
    config, cut = layout
    hf = hf_tensors(config)
    assert_same(rebuild(megatron_ranks(hf, config, **cut), config), hf)


@pytest.mark.parametrize(
    "config",
    [
        Qwen3MoeConfig(**moe_config("qwen3_moe")),
        Glm4MoeConfig(**moe_config("glm4_moe")),
        Glm4MoeConfig(**moe_config("glm4_moe", use_qk_norm=False, attention_bias=False)),
        DeepseekV3Config(**moe_config("deepseek_v3", head_dim=2)),
        DeepseekV3Config(**moe_config("deepseek_v3", head_dim=2, q_lora_rank=None)),
    ],
    ids=["qwen3_moe", "glm4_moe", "glm4_moe_plain", "deepseek_v3", "deepseek_v3_full_q"],
)
def test_names_and_shapes_are_those_of_transformers(config: Any) -> None:
    """What is published fits the model class, and a `transformers` config is taken as it is."""
    state = AutoModelForCausalLM.from_config(config).state_dict()
    hf = assemble(hf_boxes(state))
    fields = config.to_dict() | {"num_nextn_predict_layers": 0}  # model classes have none
    shards = megatron_ranks(hf, fields, tp_size=2, ep_size=2, etp_size=1)
    assert_same(rebuild(shards, config), hf)


def changed(rank: MegatronRank, name: str, tensor: torch.Tensor) -> MegatronRank:
    """A copy of a one-chunk rank with one tensor replaced or added."""
    (chunk,) = rank.chunks
    return replace(rank, chunks=[replace(chunk, tensors=dict(chunk.tensors) | {name: tensor})])


EXPERT = "decoder.layers.1.mlp.experts.linear_fc1.weight"


def test_a_missing_rank_is_a_gap_that_names_the_tensor() -> None:
    config = moe_config()
    ranks = megatron_ranks(hf_tensors(config), config, tp_size=2, ep_size=2, etp_size=1)
    with pytest.raises(PlanError, match=r"model.embed_tokens.weight: the sources give 304 of 592"):
        rebuild(ranks[:1], config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ep_size": 4}, r"ep 1/4.*weight1: each of 4 expert-parallel ranks has 1 experts"),
        ({"ep_size": 3}, r"ep 1/3, etp 0/1: 4 experts cannot be divided among 3"),
        ({"etp_size": 2}, r"ep 1/2, etp 0/2.*linear_fc1.weight0: shard 0 of 2 .*\(8, 16\)"),
        ({"tp_size": 4}, r"tp 1/4.*linear_proj.weight: shard 1 of 4 has shape"),
    ],
)
def test_a_rank_that_disagrees_about_the_topology_is_named(
    changes: dict[str, Any], message: str
) -> None:
    config = moe_config()
    ranks = megatron_ranks(hf_tensors(config), config, tp_size=2, ep_size=2, etp_size=1)
    with pytest.raises(SourceError, match=message):
        megatron_boxes(replace(ranks[1], **changes), config)


@pytest.mark.parametrize(
    "name",
    [
        EXPERT,
        f"{EXPERT}_bias0",
        "decoder.layers.1.mlp.experts.linear_fc1.bias0",
        "decoder.layers.1.mlp.experts.linear_fc3.weight0",
        "decoder.layers.1.mlp.experts.weight3",
        "decoder.layers.1.mlp.router.bias",
        "decoder.layers.1.mlp.shared_experts.linear_fc1.weight",
        "decoder.layers.1.self_attention.linear_kv_up_proj.weight",
        "mtp.layers.0.enorm.weight",
    ],
)
def test_an_unknown_parameter_is_an_error_that_names_rank_and_parameter(name: str) -> None:
    """What another family has is unknown here: nothing is replicated by default."""
    config = moe_config()
    (rank,) = megatron_ranks(hf_tensors(config), config)
    with pytest.raises(SourceError, match=f"tp 0/1, pp 0/1: unknown Megatron parameter {name}"):
        megatron_boxes(changed(rank, name, torch.zeros(16)), config)


def test_more_mtp_layers_than_the_config_has_are_an_error() -> None:
    config = moe_config("glm4_moe", num_nextn_predict_layers=2)
    (rank,) = megatron_ranks(hf_tensors(config), config)
    with pytest.raises(SourceError, match=r"mtp.layers.1.* num_nextn_predict_layers = 1"):
        megatron_boxes(rank, config | {"num_nextn_predict_layers": 1})


def test_the_newer_name_of_the_layer_inside_an_mtp_layer_is_known() -> None:
    config = moe_config("glm4_moe", num_nextn_predict_layers=1)
    hf = hf_tensors(config)
    (rank,) = megatron_ranks(hf, config)
    (chunk,) = rank.chunks
    newer = {
        name.replace("transformer_layer", "mtp_model_layer"): tensor
        for name, tensor in chunk.tensors.items()
    }
    assert_same(rebuild([replace(rank, chunks=[replace(chunk, tensors=newer)])], config), hf)


def test_experts_given_in_two_layouts_are_an_error() -> None:
    """Two parameters for one HF tensor: which of them is trained cannot be known."""
    config = moe_config()
    (rank,) = megatron_ranks(hf_tensors(config), config)
    other = "decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight"
    with pytest.raises(SourceError, match=r"linear_fc1.weight0 and .*local_experts.0.* both give"):
        megatron_boxes(changed(rank, other, torch.zeros(16, 16)), config)


@pytest.mark.parametrize("shape", [(16, 65), (17, 64), (1024,)], ids=["columns", "hidden", "flat"])
def test_legacy_experts_of_another_shape_are_an_error(shape: tuple[int, ...]) -> None:
    config = moe_config()
    (rank,) = megatron_ranks(hf_tensors(config), config, experts="legacy")
    name = "decoder.layers.0.mlp.experts.weight1"
    with pytest.raises(SourceError, match=r"mlp.experts.weight1: shape .* 4 experts of hidden"):
        megatron_boxes(changed(rank, name, torch.zeros(shape)), config)


def test_legacy_experts_are_views_of_the_trainers_memory() -> None:
    """What the trainer writes after the map was made is what a receiver reads."""
    config = moe_config()
    hf = hf_tensors(config)
    (rank,) = megatron_ranks(hf, config, experts="legacy")
    boxes = megatron_boxes(rank, config)
    for tensor in rank.chunks[0].tensors.values():
        tensor.mul_(2)
    assert_same(assemble(boxes), {name: 2 * tensor for name, tensor in hf.items()})


def test_an_output_gate_follows_each_head_in_the_hf_tensor() -> None:
    """Two heads of 4 in one group: Megatron holds q0 q1 z0 z1 k v, HF q0 z0 q1 z1."""
    config = moe_config(num_attention_heads=2, num_key_value_heads=1)
    hf = hf_tensors(config | {"attention_gate": True})
    (rank,) = megatron_ranks(hf, config | {"attention_gate": True})
    query = [
        (box.start[0], box.shape[0])
        for box in megatron_boxes(rank, config)
        if box.name == "model.layers.0.self_attn.q_proj.weight"
    ]
    assert query == [(0, 4), (8, 4), (4, 4), (12, 4)]
