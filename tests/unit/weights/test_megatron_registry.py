"""Families that users add, by rules that are checked when they are given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine_plugins import MegatronRule, register_family
from engine_plugins.errors import SourceError
from engine_plugins.weights.boxes.placement import SourceBox, assemble
from engine_plugins.weights.sources.megatron import registry
from engine_plugins.weights.sources.megatron.names import MegatronNames
from engine_plugins.weights.sources.megatron.rank import MegatronRank
from engine_plugins.weights.sources.megatron.registry import GivenRules
from engine_plugins.weights.sources.megatron.source import megatron_boxes, megatron_boxes_of
from tests.support.megatron_hf import dense_config, hf_tensors, moe_config
from tests.support.megatron_shards import megatron_ranks

LAYER = "decoder.layers.{layer}."


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    before = dict(registry._REGISTERED)
    yield
    registry._REGISTERED.clear()
    registry._REGISTERED.update(before)


def rebuilt(
    ranks: list[MegatronRank], config: dict[str, Any], rules: GivenRules | None = None
) -> dict[str, torch.Tensor]:
    boxes: list[SourceBox] = megatron_boxes_of(ranks, config, rules)
    return assemble(boxes)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


@pytest.mark.parametrize(
    ("alias", "like"), [("mistral", "llama"), ("kimi_k2", "deepseek_v3"), ("mine", "qwen3_moe")]
)
def test_an_alias_is_sent_like_the_family_that_it_is(alias: str, like: str) -> None:
    if alias == "mine":
        register_family(alias, like=like)
    config = dense_config(like) if like == "llama" else moe_config(like)
    hf = hf_tensors(config)
    ranks = megatron_ranks(hf, config, tp_size=2)
    assert same(rebuilt(ranks, config | {"model_type": alias}), hf)


ALL: GivenRules = {
    "embedding.word_embeddings.weight": MegatronRule(
        "model.embed_tokens.weight", cut="column", rows="padded"
    ),
    "decoder.final_layernorm.weight": MegatronRule("model.norm.weight", cut="replicated"),
    "output_layer.weight": MegatronRule("lm_head.weight", cut="column", rows="padded"),
    LAYER + "self_attention.linear_qkv.weight": MegatronRule(
        (
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        ),
        rows="qkv",
        cut="column",
    ),
    LAYER + "self_attention.linear_qkv.layer_norm_weight": MegatronRule(
        "model.layers.{layer}.input_layernorm.weight", cut="replicated", shape=("hidden_size",)
    ),
    LAYER + "self_attention.linear_proj.weight": MegatronRule(
        "model.layers.{layer}.self_attn.o_proj.weight",
        cut="row",
        shape=("hidden_size", "num_attention_heads*head_dim"),
    ),
    LAYER + "self_attention.q_layernorm.weight": MegatronRule(
        "model.layers.{layer}.self_attn.q_norm.weight", cut="replicated"
    ),
    LAYER + "self_attention.k_layernorm.weight": MegatronRule(
        "model.layers.{layer}.self_attn.k_norm.weight", cut="replicated"
    ),
    LAYER + "pre_mlp_layernorm.weight": MegatronRule(
        "model.layers.{layer}.post_attention_layernorm.weight", cut="replicated"
    ),
    LAYER + "mlp.router.weight": MegatronRule(
        "model.layers.{layer}.mlp.gate.weight", cut="replicated"
    ),
    LAYER + "mlp.experts.linear_fc1.weight{expert}": MegatronRule(
        (
            "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
            "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        ),
        cut="column",
        rows="gated",
    ),
    LAYER + "mlp.experts.linear_fc2.weight{expert}": MegatronRule(
        "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", cut="row"
    ),
}
"""A whole family of one's own, shapes mostly left to the shards."""


@pytest.mark.parametrize("registered", [True, False])
def test_a_family_of_ones_own_is_sent_whole(registered: bool) -> None:
    config = moe_config("qwen3_moe") | {"model_type": "mine"}
    hf = hf_tensors(config | {"model_type": "qwen3_moe"})
    ranks = megatron_ranks(
        hf, config, tp_size=4, ep_size=2, etp_size=2, stages=[[[0]], [[1]]], vocab_multiple=8
    )
    if registered:
        register_family("mine", ALL)
        assert same(rebuilt(ranks, config), hf)
    else:
        assert same(rebuilt(ranks, config, ALL), hf)


def test_a_rule_of_one_sender_comes_before_the_family() -> None:
    config = dense_config("llama")
    hf = hf_tensors(config)
    (rank,) = megatron_ranks(hf, config)
    rules: GivenRules = {
        LAYER + "mlp.linear_fc2.weight": MegatronRule("layers.{layer}.down", cut="row"),
        "output_layer.weight": None,
    }
    found = rebuilt([rank], config, rules)
    assert "lm_head.weight" not in found
    assert torch.equal(found["layers.1.down"], hf["model.layers.1.mlp.down_proj.weight"])
    assert same(rebuilt([rank], config), hf), "the family itself is left as it was"


def test_segments_are_cut_each_for_itself() -> None:
    """As Mamba's projection: a rank has its share of every stretch of the one HF tensor."""
    whole = torch.arange(2 * 4 * 6 + 2 * 4 + 4).float()[:, None].expand(-1, 3).contiguous()
    stretches = whole.split([24, 24, 4, 4, 4])
    rule = MegatronRule(
        "in.{layer}", cut="column", rows="segments", segments=(24, "n*6", "g", "g", 4)
    )
    config = {"num_hidden_layers": 1, "n": 4, "g": 4}
    ranks = []
    for place in range(2):
        shard = torch.cat([part.chunk(2)[place] for part in stretches])
        (rank,) = megatron_ranks(hf_tensors(dense_config()), dense_config())
        tensors = {"decoder.layers.0.mixer.in_proj.weight": shard}
        chunk = replace(rank.chunks[0], tensors=tensors, global_layers=[0])
        ranks.append(MegatronRank(chunks=[chunk], tp_rank=place, tp_size=2))
    found = rebuilt(ranks, config, {LAYER + "mixer.in_proj.weight": rule})
    assert same(found, {"in.0": whole})
    with pytest.raises(SourceError, match=r"in_proj.*segments of \[24, 30"):
        rebuilt(ranks, config | {"n": 5}, {LAYER + "mixer.in_proj.weight": rule})


def test_the_name_alone_is_cut_as_the_modules_class_says() -> None:
    """And is an error where no class is known."""
    config = dense_config("llama")
    hf = hf_tensors(config)
    rules: GivenRules = {LAYER + "mlp.linear_fc2.weight": "layers.{layer}.down"}
    ranks = megatron_ranks(hf, config, tp_size=2)
    with pytest.raises(SourceError, match=r"linear_fc2\.weight: nothing says how it is cut"):
        rebuilt(ranks, config, rules)
    ranks = [
        replace(
            rank,
            chunks=[
                replace(
                    chunk,
                    classes={
                        name: "RowParallelLinear"
                        for name in chunk.tensors
                        if name.endswith("mlp.linear_fc2.weight")
                    },
                )
                for chunk in rank.chunks
            ],
        )
        for rank in ranks
    ]
    found = rebuilt(ranks, config, rules)
    assert torch.equal(found["layers.0.down"], hf["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (MegatronRule("a", cut="diagonal"), "diagonal"),  # type: ignore[arg-type]
        (MegatronRule("a", rows="woven"), "woven"),  # type: ignore[arg-type]
        (MegatronRule("a", rows="gated"), "gated rows hold 2 tensors"),
        (MegatronRule(("a", "b"), rows="qkv"), "qkv rows hold 3 tensors"),
        (MegatronRule(("a", "b")), "plain rows hold 1 tensors"),
        (MegatronRule("a.{expert}"), "a number that the native name has not"),
        (MegatronRule("a.{layers}"), r"\{layers\}"),
        (MegatronRule("a.{layer"), "a.{layer"),
        (MegatronRule("a", rows="segments"), "segments go together"),
        (MegatronRule("a", segments=(1, 2)), "segments go together"),
        (MegatronRule("a", rows="padded", cut="row"), "cannot be cut as row"),
        (MegatronRule("a", shape=("hidden - 1",)), "no size: 'hidden - 1'"),
        (MegatronRule(("q", "k", "v"), rows="qkv", shape=(1,)), "come from the HF config"),
        (7, "a int is no rule"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_when_it_is_given(rule: Any, says: str) -> None:
    native = LAYER + "mlp.linear_fc1.weight"
    for give in (
        lambda: register_family("mine", {native: rule}),
        lambda: MegatronNames(dense_config(), {native: rule}),
    ):
        with pytest.raises(SourceError, match=r"linear_fc1\.weight: .*" + says):
            give()
    assert "mine" not in registry._REGISTERED


def test_a_family_is_registered_once_or_on_purpose() -> None:
    """The same again is nothing, as where a module is imported twice."""
    name = LAYER + "mlp.linear_fc2.weight"
    for _ in range(2):
        register_family("mine", {name: "a.{layer}"}, like="llama")
    with pytest.raises(SourceError, match="mine is known, with other rules"):
        register_family("mine", {name: "b.{layer}"}, like="llama")
    with pytest.raises(SourceError, match="llama is known"):
        register_family("llama", {name: "b.{layer}"}, like="llama")
    register_family("mine", {name: "b.{layer}"}, like="llama", replace_known=True)
    with pytest.raises(SourceError, match=r"like = 'lama' is no known family: .*llama, mine"):
        register_family("other", like="lama")
    with pytest.raises(SourceError, match="no rules"):
        register_family("other")


def test_what_a_family_of_ones_own_lacks_is_named_with_the_key_to_give() -> None:
    config = moe_config("qwen3_moe") | {"model_type": "mine"}
    (rank,) = megatron_ranks(hf_tensors(config | {"model_type": "qwen3_moe"}), config)
    key = LAYER + "mlp.experts.linear_fc2.weight{expert}"
    with pytest.raises(SourceError, match=r"unknown Megatron parameter .*experts\.linear") as told:
        megatron_boxes(rank, config, {name: rule for name, rule in ALL.items() if name != key})
    assert key in told.value.remedy


def test_a_size_that_the_config_lacks_is_named() -> None:
    config = dense_config("llama")
    (rank,) = megatron_ranks(hf_tensors(config), config)
    rule = MegatronRule("a.{layer}", cut="row", shape=("hidden_size", "ffn_size"))
    with pytest.raises(SourceError, match="ffn_size = None"):
        megatron_boxes(rank, config, {LAYER + "mlp.linear_fc2.weight": rule})
    rule = MegatronRule("a.{layer}", cut="row", shape=("hidden_size", "2*vocab_size"))
    with pytest.raises(SourceError, match=r"mlp\.linear_fc2\.weight.*\(16, 74\)"):
        megatron_boxes(rank, config, {LAYER + "mlp.linear_fc2.weight": rule})
