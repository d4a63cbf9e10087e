"""Megatron shards of any legal layout rebuild the HF tensors; contradictions are errors."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.weights.boxes.placement import SourceBox, assemble
from engine_plugins.weights.sources.megatron.source import (
    MegatronChunk,
    MegatronRank,
    megatron_boxes,
)
from tests.support.megatron_hf import dense_config, hf_tensors
from tests.support.megatron_shards import megatron_ranks


def rebuild(ranks: list[MegatronRank], config: Any) -> dict[str, torch.Tensor]:
    return assemble(box for rank in ranks for box in megatron_boxes(rank, config))


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def changed(rank: MegatronRank, **tensors: torch.Tensor | None) -> MegatronRank:
    """A copy of a one-chunk rank with tensors replaced, added (`.` as `__`) or removed."""
    (chunk,) = rank.chunks
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = dict(chunk.tensors) | new
    present = {name: tensor for name, tensor in kept.items() if tensor is not None}
    return replace(rank, chunks=[replace(chunk, tensors=present)])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config, and a way to cut it that Megatron allows."""
    tp_size = draw(st.sampled_from([1, 2, 4]))
    groups = draw(st.sampled_from([1, 2, 3, 4]))
    heads = groups * draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([2, 4, 6]))
    # Megatron cuts equally, so the q rows and the fused rows must divide by tp.
    heads *= tp_size if heads * head_dim % tp_size else 1
    if (heads + 2 * groups) * head_dim % tp_size:
        head_dim *= tp_size
    layers = draw(st.integers(1, 5))
    cuts = draw(st.lists(st.integers(0, layers), max_size=3).map(sorted))
    edges = [0, *cuts, layers]
    chunks = [list(range(a, b)) for a, b in pairwise(edges)]
    virtual = draw(st.sampled_from([v for v in (1, 2) if len(chunks) % v == 0]))
    stages = [chunks[stage :: len(chunks) // virtual] for stage in range(len(chunks) // virtual)]
    config = dense_config(
        draw(st.sampled_from(["llama", "qwen2", "qwen3"])),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        intermediate_size=tp_size * draw(st.integers(1, 5)),
        num_hidden_layers=layers,
        vocab_size=draw(st.integers(1, 40)),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
    )
    if config["model_type"] == "qwen2":
        del config["attention_bias"]
    if config["model_type"] == "llama":
        config["mlp_bias"] = draw(st.booleans())
    return config, {
        "tp_size": tp_size,
        "stages": stages,
        "local_spec": draw(st.booleans()),
        "vocab_multiple": draw(st.sampled_from([1, 8, 128])),
        "prefix": draw(st.sampled_from(["", "module.", "module.module."])),
    }


@settings(max_examples=80, deadline=None)
@given(layouts())
def test_any_layout_rebuilds_the_hf_tensors(
    layout: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """TP, uneven PP, VPP, few groups, odd vocabularies, ties, biases, specs and wrappers."""
    config, cut = layout
    hf = hf_tensors(config)
    assert_same(rebuild(megatron_ranks(hf, config, **cut), config), hf)


def without_head_dim(config: dict[str, Any]) -> dict[str, Any]:
    """The head size is then hidden / heads."""
    return {name: value for name, value in config.items() if name != "head_dim"}


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**dense_config("qwen3")),
        Qwen2Config(**without_head_dim(dense_config("qwen2"))),
        LlamaConfig(**dense_config("llama", attention_bias=True, mlp_bias=True)),
        LlamaConfig(**dense_config("llama", tie_word_embeddings=True)),
    ],
    ids=["qwen3", "qwen2", "llama_biases", "llama_tied"],
)
def test_names_and_shapes_are_those_of_transformers(config: Any) -> None:
    """What is published fits the model class, and a `transformers` config is taken as it is."""
    model = AutoModelForCausalLM.from_config(config)
    hf = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not config.tie_word_embeddings
    }
    assert_same(rebuild(megatron_ranks(hf, config.to_dict(), tp_size=2), config), hf)


def rows_of(boxes: list[SourceBox], leaf: str) -> list[tuple[int, int]]:
    """(first row, rows) of layer 0's boxes of one tensor."""
    name = f"model.layers.0.{leaf}"
    return [(box.start[0], box.shape[0]) for box in boxes if box.name == name]


def test_fewer_groups_than_ranks_cut_inside_a_group() -> None:
    """8 heads in 2 groups on 4 ranks: rank 1 holds q3, k0 and v0."""
    config = dense_config(num_key_value_heads=2)
    ranks = megatron_ranks(hf_tensors(config), config, tp_size=4)
    boxes = megatron_boxes(ranks[1], config)
    assert rows_of(boxes, "self_attn.q_proj.weight") == [(12, 4)]
    assert rows_of(boxes, "self_attn.k_proj.weight") == [(0, 4)]
    assert rows_of(boxes, "self_attn.v_proj.weight") == [(0, 4)]
    assert rows_of(megatron_boxes(ranks[0], config), "self_attn.k_proj.weight") == []


def test_a_rank_with_only_vocabulary_padding_gives_no_vocabulary_box() -> None:
    config = dense_config(vocab_size=5)
    ranks = megatron_ranks(hf_tensors(config), config, tp_size=4, vocab_multiple=4)
    given_rows = [
        [box.shape[0] for box in megatron_boxes(rank, config) if box.name == "lm_head.weight"]
        for rank in ranks
    ]
    assert given_rows == [[4], [1], [], []]


def test_boxes_are_views_of_the_trainers_memory() -> None:
    """What the trainer writes after the map was made is what a receiver reads."""
    config = dense_config()
    hf = hf_tensors(config)
    ranks = megatron_ranks(hf, config, tp_size=2)
    boxes = [box for rank in ranks for box in megatron_boxes(rank, config)]
    for rank in ranks:
        for tensor in rank.chunks[0].tensors.values():
            tensor.mul_(2)
    assert_same(assemble(boxes), {name: 2 * tensor for name, tensor in hf.items()})


def test_boxes_are_outside_autograd() -> None:
    config = dense_config()
    (rank,) = megatron_ranks(hf_tensors(config), config)
    for tensor in rank.chunks[0].tensors.values():
        tensor.requires_grad_()
    assert not any(box.data.requires_grad for box in megatron_boxes(rank, config))


def test_a_chunk_with_the_embedding_alone_is_legal() -> None:
    config = dense_config()
    hf = hf_tensors(config)
    ranks = megatron_ranks(hf, config, stages=[[[]], [[0, 1]]])
    assert [box.name for box in megatron_boxes(ranks[0], config)] == ["model.embed_tokens.weight"]
    assert_same(rebuild(ranks, config), hf)


def test_extra_state_is_never_read() -> None:
    """Transformer Engine's extra state may be bytes, an odd tensor or None."""
    config = dense_config()
    hf = hf_tensors(config)
    (rank,) = megatron_ranks(hf, config)
    tensors: dict[str, Any] = dict(rank.chunks[0].tensors) | {
        "decoder.layers.0.self_attention.core_attention._extra_state": None,
        "module.decoder.final_layernorm._extra_state": b"pickled",
        "output_layer._extra_state": torch.zeros(3, dtype=torch.uint8),
    }
    chunk = MegatronChunk(tensors=tensors, global_layers=[0, 1])
    assert_same(rebuild([replace(rank, chunks=[chunk])], config), hf)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.mlp.router.weight",
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "decoder.layers.0.mlp.linear_fc2.bias",
        "decoder.final_layernorm.bias",
        "embedding.position_embeddings.weight",
        "decoder.layers.x.input_layernorm.weight",
    ],
)
def test_an_unknown_parameter_is_an_error_that_names_it(name: str) -> None:
    """Biases that the config does not have count as unknown: HF has no place for them."""
    config = dense_config("llama")
    (rank,) = megatron_ranks(hf_tensors(config), config)
    with pytest.raises(SourceError, match=f"unknown Megatron parameter {name}"):
        megatron_boxes(changed(rank, **{name: torch.zeros(16)}), config)


@pytest.mark.parametrize("model_type", ["bloom", "gemma3", None])
def test_an_unsupported_family_is_named_with_the_supported_ones(model_type: str | None) -> None:
    """And with every way to have it sent all the same."""
    config = dense_config()
    (rank,) = megatron_ranks(hf_tensors(config), config)
    with pytest.raises(UnsupportedError, match=rf"{model_type}.*llama, .*qwen2, .*qwen3") as told:
        megatron_boxes(rank, config | {"model_type": model_type})
    for way in (f"register_family('{model_type}'", "rules=", "megatron.bridge", "from_hf"):
        assert way in told.value.remedy


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"num_attention_heads": 16}, r"linear_proj.*\(16, 16\).*\(16, 32\)"),
        ({"num_key_value_heads": 2}, r"linear_qkv.*\(32, 16\).*\(24, 16\)"),
        ({"intermediate_size": 48}, r"linear_fc1.*\(24, 16\).*\(48, 16\)"),
        ({"hidden_size": 8}, r"\(.*16\).*\(.*8\)"),
        ({"vocab_size": 64}, "2 shards of 19 rows.*vocabulary of 64"),
        ({"head_dim": 8}, "shape"),
        ({"num_hidden_layers": 1}, r"global layers \[1\].*1 layers"),
        ({"intermediate_size": 25}, "25.*2"),
        ({"num_key_value_heads": 3}, "8 attention heads.*3 key-value heads"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"vocab_size": "37"}, "vocab_size = '37'"),
    ],
)
def test_a_config_of_another_model_is_an_error_with_the_numbers(
    changes: dict[str, Any], numbers: str
) -> None:
    config = dense_config()
    ranks = megatron_ranks(hf_tensors(config), config, tp_size=2)
    with pytest.raises(SourceError, match=numbers):
        megatron_boxes(ranks[0], config | changes)


def test_a_wrong_tp_size_is_an_error() -> None:
    config = dense_config()
    (rank,) = megatron_ranks(hf_tensors(config), config)
    with pytest.raises(SourceError, match="shard 0 of 2 has shape"):
        megatron_boxes(replace(rank, tp_size=2), config)


def test_an_odd_number_of_dimensions_is_an_error() -> None:
    config = dense_config()
    (rank,) = megatron_ranks(hf_tensors(config), config)
    with pytest.raises(SourceError, match=r"output_layer.*shape \(\)"):
        megatron_boxes(changed(rank, output_layer__weight=torch.tensor(1.0)), config)


@pytest.mark.parametrize("layers", [[0], [0, 1, 2], []])
def test_global_layers_must_match_the_local_layers(layers: list[int]) -> None:
    config = dense_config()
    (rank,) = megatron_ranks(hf_tensors(config), config)
    chunk = replace(rank.chunks[0], global_layers=layers)
    with pytest.raises(SourceError, match=r"local layers \[0, 1\].*global_layers"):
        megatron_boxes(replace(rank, chunks=[chunk]), config)


@pytest.mark.parametrize("twice", ["chunk", "layer", "norm", "prefix"])
def test_one_box_given_twice_by_a_rank_is_an_error(twice: str) -> None:
    """Two parameters for one HF tensor: which of them is trained cannot be known."""
    config = dense_config()
    (rank,) = megatron_ranks(hf_tensors(config), config)
    (chunk,) = rank.chunks
    name = "decoder.layers.0.input_layernorm.weight"
    wrong = {
        "chunk": replace(rank, chunks=[chunk, chunk]),
        "layer": replace(rank, chunks=[replace(chunk, global_layers=[1, 1])]),
        "norm": changed(rank, **{name: torch.zeros(16)}),
        "prefix": changed(rank, module__output_layer__weight=torch.zeros(37, 16)),
    }
    with pytest.raises(SourceError, match=r"both give|there twice"):
        megatron_boxes(wrong[twice], config)


def test_a_tensor_that_cannot_be_sent_is_named() -> None:
    config = dense_config()
    (rank,) = megatron_ranks(hf_tensors(config), config)
    meta = torch.zeros(37, 16, device="meta")
    with pytest.raises(SourceError, match=r"output_layer\.weight: a meta tensor"):
        megatron_boxes(changed(rank, output_layer__weight=meta), config)
