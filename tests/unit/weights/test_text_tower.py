"""A text model for an engine that serves the whole, and the text of a whole for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine_plugins.errors import WeightMismatchError
from engine_plugins.weights.boxes.model_facts import compare_facts, model_facts
from engine_plugins.weights.boxes.placement import assemble
from engine_plugins.weights.sources.hf_offer import HfOffer
from tests.families.maker import checkpoint

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["full_attention", "full_attention"],
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "image_size": 28,
    "patch_size": 14,
}
WHOLES = ["Gemma3Config", "Qwen3_5Config", "Qwen3_5MoeConfig"]


def whole(name: str) -> Any:
    config = getattr(transformers, name)(text_config=TEXT, vision_config=VISION)
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(config)


def text_of(model: Any) -> Any:
    """The text model with the whole one's values."""
    text = transformers.AutoModelForCausalLM.from_config(model.config.text_config)
    text.base_model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    return text


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return checkpoint(folder)


@pytest.mark.parametrize("name", WHOLES)
def test_a_text_model_has_the_names_that_the_whole_has_for_it(name: str, tmp_path: Path) -> None:
    """By the engine's config, as object or folder; what is not offered is the rest."""
    model = whole(name)
    expected = saved(model, tmp_path)
    for config in (model.config, tmp_path):
        offer = HfOffer(text_of(model), config)
        found = assemble(offer.boxes())
        assert {name for name in expected if name not in found} == {
            name for name in expected if "vis" in name or "multi_modal" in name
        }
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        assert offer.facts["model_type"] == model.config.model_type


@pytest.mark.parametrize("name", WHOLES)
def test_a_whole_model_gives_its_text_to_an_engine_of_the_text(name: str, tmp_path: Path) -> None:
    model = whole(name)
    text = text_of(model)
    expected = saved(text, tmp_path)
    found = assemble(HfOffer(model, text.config).boxes())
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_text_model_of_another_family_is_not_renamed() -> None:
    """Then the engine's facts are another model's, and it is refused."""
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**TEXT, "layer_types": None, "num_experts": None})
    )
    config = whole("Qwen3_5Config").config
    names = {box.name for box in HfOffer(llama, config).boxes()}
    assert "model.layers.0.mlp.up_proj.weight" in names


def test_text_against_whole_says_how_to_send_it() -> None:
    config = whole("Qwen3_5Config").config
    with pytest.raises(WeightMismatchError, match="model_type 'qwen3_5_text'") as raised:
        compare_facts(model_facts(config.text_config), model_facts(config), who="the trainer")
    assert "config=" in raised.value.remedy
    assert "only='*'" in raised.value.remedy
    with pytest.raises(WeightMismatchError) as other:
        compare_facts({"model_type": "llama"}, {"model_type": "qwen3"}, who="the trainer")
    assert "only" not in other.value.remedy
