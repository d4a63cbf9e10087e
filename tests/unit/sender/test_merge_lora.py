"""A peft model is sent as its merged twin would be, and its own weights stay as they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.pytorch_utils import Conv1D

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.sources.forms.block_fp8 import BlockFp8
from engine_plugins.weights.sources.hf_offer import HfOffer
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.block_fp8 import quantized_whole
from tests.support.fake_engine import TOKEN, FakeEngine, served
from tests.support.process_group import output_of_ranks

peft = pytest.importorskip("peft")  # collected, and not run, in SGLang's environment


def tiny(**more: Any) -> nn.Module:
    config = Qwen3Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
        **more,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config)


def adapted(model: nn.Module, **more: Any) -> Any:
    """With adapters that change something: peft's own begin at nothing."""
    targets = more.pop("target_modules", ["q_proj", "down_proj"])
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **more)
    made = peft.get_peft_model(model, config)
    train(made)
    return made


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))


def merged(model: Any) -> dict[str, torch.Tensor]:
    """What peft itself makes of a copy."""
    return dict(copy.deepcopy(model).merge_and_unload().named_parameters())


def offered(model: nn.Module) -> tuple[HfOffer, dict[str, torch.Tensor]]:
    offer = HfOffer(model, merge_lora=True)
    if offer.merged is not None:
        for step in offer.merged.gathers([0]):
            step()
    return offer, {box.name: box.data for box in offer.boxes()}


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def conv() -> nn.Module:
    """Weights lie as [in, out] (GPT-2's kind)."""
    model = nn.Module()
    model.add_module("c_attn", Conv1D(12, 8))
    model.add_module("norm", nn.LayerNorm(8))
    return model


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (tiny, {}),
        (tiny, {"use_rslora": True}),
        (tiny, {"target_modules": "all-linear"}),
        (tiny, {"target_modules": ["q_proj", "embed_tokens"]}),
        (tiny, {"modules_to_save": ["lm_head", "norm"]}),
        (conv, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
    ids=["plain", "rslora", "all", "embedding", "modules_to_save", "conv1d"],
)
def test_it_is_what_peft_itself_merges(
    base: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    """To the bit; only what adapters change has memory of its own."""
    model = adapted(base(), **options)
    before = {name: each.clone() for name, each in model.named_parameters()}
    offer, found = offered(model)
    same(found, merged(model))
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
    storages = {each.untyped_storage().data_ptr() for each in model.parameters()}
    copied = {
        name for name, each in found.items() if each.untyped_storage().data_ptr() not in storages
    }
    targets = options.get("target_modules", ["q_proj", "down_proj"])
    if isinstance(targets, list):
        weights = {name for name in found if name.endswith(".weight")}
        assert copied == {name for name in weights if name.split(".")[-2] in targets}
    assert offer.merged is not None
    assert (
        0 < offer.merged.nbytes < 2 * sum(found[name].nbytes for name in copied) + 256 * len(copied)
    )


def test_a_bfloat16_base_is_rounded_once() -> None:
    """The sum is made in float32, as adapters are held."""
    model = adapted(tiny().to(torch.bfloat16))
    _, found = offered(model)
    name = "model.layers.1.self_attn.q_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 1.5
    assert delta.dtype == torch.float32
    exact = layer.base_layer.weight.float() + delta
    assert torch.equal(found[f"{name}.weight"], exact.bfloat16())


def test_the_adapters_that_are_active_count() -> None:
    """Two at once, another, none: as the forward pass has it at the update."""
    model = adapted(tiny())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj", "q_proj"]))
    model.set_adapter("other")
    train(model)
    same(offered(model)[1], merged(model))
    model.base_model.set_adapter(["default", "other"])
    found = offered(model)[1]
    twin = copy.deepcopy(model)
    expected = dict(twin.merge_and_unload(adapter_names=["default", "other"]).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], each, atol=1e-5) for name, each in expected.items())
    base = dict(tiny().named_parameters())
    with model.disable_adapter():
        same(offered(model)[1], base)


def test_adapters_that_are_merged_already_are_not_added_again() -> None:
    """Also without `merge_lora`: the base's weights are what the model computes with."""
    model = adapted(tiny())
    expected = merged(model)
    model.merge_adapter()
    for merge in (True, False):
        offer = HfOffer(model, merge_lora=merge)
        same({box.name: box.data for box in offer.boxes()}, expected)
    model.unmerge_adapter()
    with pytest.raises(SourceError, match="4 weights have adapters") as caught:
        HfOffer(model).boxes()
    assert "merge_lora=True" in caught.value.remedy


def test_adapters_that_transformers_put_in_are_merged_too() -> None:
    """`model.add_adapter`: the same layers, and no PeftModel around them."""
    model: Any = tiny()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["o_proj"]))
    train(model)
    found = offered(model)[1]
    assert found.keys() == dict(tiny().named_parameters()).keys()
    layer = model.model.layers[0].self_attn.o_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.equal(found["model.layers.0.self_attn.o_proj.weight"], expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "Dora"),
        ({"lora_bias": True, "target_modules": ["head"]}, "bias"),
        ({"trainable_token_indices": [1, 2]}, "TrainableTokens"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(options: dict[str, Any], said: str) -> None:
    model = tiny()
    if options.get("target_modules") == ["head"]:
        model.add_module("head", nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match=said):
        offered(adapted(model, **options))


def test_other_adapters_are_refused_by_name() -> None:
    config = peft.LoHaConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(UnsupportedError, match=r"q_proj: a .*loha.* is not merged here"):
        offered(peft.get_peft_model(tiny(), config))


def test_a_tied_weight_under_an_adapter_is_refused() -> None:
    """The engine would apply it in both places."""
    model = tiny()
    head: Any = model.get_submodule("lm_head")
    head.weight = model.get_parameter("model.embed_tokens.weight")
    with pytest.raises(UnsupportedError, match=r"embed_tokens\.weight is shared"):
        offered(adapted(model, target_modules=["embed_tokens"]))


def test_an_embedding_that_is_trained_apart_from_its_tied_head_is_refused() -> None:
    """The head keeps what the embedding was before, and the engine would compute with the new."""
    model = tiny()
    head: Any = model.get_submodule("lm_head")
    head.weight = model.get_parameter("model.embed_tokens.weight")
    trained = adapted(model, modules_to_save=["embed_tokens"])
    trained.get_base_model().config.tie_word_embeddings = True
    with pytest.raises(SourceError, match=r"lm_head\.weight has values of its own"):
        offered(trained)
    with trained.disable_adapter():
        assert "lm_head.weight" not in offered(trained)[1], "one parameter again"


def test_names_that_a_peft_model_gives_are_refused() -> None:
    model = adapted(tiny())
    with pytest.raises(SourceError, match="names of a model with adapters"):
        HfOffer(dict(model.named_parameters())).boxes()
    with pytest.raises(SourceError, match="merge_lora is for a model"):
        HfOffer(dict(model.named_parameters()), merge_lora=True)


def test_every_update_merges_anew_and_release_frees_it(
    engine: FakeEngine, transport: InMemoryTransport
) -> None:
    """Cast to what the engine wants on top; the engine's plan stays."""
    model = adapted(tiny())
    name = "model.layers.0.mlp.down_proj.weight"
    engine.wants = {name: "bfloat16"}
    with WeightSender.from_hf(
        model, engines=engine.url, token=TOKEN, transport=transport, merge_lora=True
    ) as sender:
        for version in (1, 2, 3):
            train(model)
            report = sender.update(version)
            expected = merged(model)
            expected[name] = expected[name].bfloat16()
            same(engine.weights, expected)
            adapted_bytes = 2 * (32 * 32 + 32 * 48) * 4
            assert report.slot_bytes == (adapted_bytes + 32 * 48 * 2,)
            if version == 2:
                assert len(engine.plans) == 1
                sender.release()


def test_merged_weights_are_quantized_like_any_others(
    engine: FakeEngine, transport: InMemoryTransport
) -> None:
    """One form over the slots of another."""
    base = nn.Module()
    base.add_module("up_proj", nn.Linear(200, 300, bias=False))
    model = adapted(base, target_modules=["up_proj"])
    with WeightSender.from_hf(
        model,
        engines=engine.url,
        token=TOKEN,
        transport=transport,
        merge_lora=True,
        quantization=BlockFp8(),
    ) as sender:
        for version in (1, 2):
            train(model)
            sender.update(version)
            expected = quantized_whole(merged(model), BlockFp8())
            assert engine.weights.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(engine.weights[name].view(torch.uint8), tensor.view(torch.uint8))


def test_sharded_adapters_are_merged_shard_by_shard(tmp_path: Path) -> None:
    """Three ranks that divide nothing evenly; what is left of each is what the whole would have."""
    with served(FakeEngine(pulls=False)) as engine:
        said = output_of_ranks(
            "tests.support.lora_trainer_rank", "3", str(tmp_path / "rendezvous"), engine.url
        )
    answers = [json.loads(line) for line in said.splitlines()]
    assert len(answers) == 6
    assert all(answer["wrong"] == [] for answer in answers), answers
    assert len(engine.plans) == 1
