"""Only plain, comparable facts leave a config, whatever its shape."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine_plugins.errors import WeightMismatchError
from engine_plugins.weights.boxes.model_facts import compare_facts, model_facts


def test_dicts_and_objects_say_the_same() -> None:
    """A fact that is missing, None or no plain value is left out."""
    config = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "vocab_size": None,
        "intermediate_size": [1, 2],
        "tie_word_embeddings": True,
        "architectures": ["Qwen3ForCausalLM"],
    }
    facts = {"model_type": "qwen3", "hidden_size": 64, "tie_word_embeddings": True}
    assert model_facts(config) == facts
    assert model_facts(SimpleNamespace(**config)) == facts


def test_a_nested_text_config_is_preferred() -> None:
    """The whole names the model; its language part has the sizes."""
    text = {"model_type": "part", "hidden_size": 32, "num_local_experts": 8}
    config = {"model_type": "whole", "hidden_size": 999, "vocab_size": 7, "text_config": text}
    assert model_facts(config) == {
        "model_type": "whole",
        "hidden_size": 32,
        "vocab_size": 7,
        "num_experts": 8,
    }


def test_models_with_experts_or_latent_attention_are_told_apart() -> None:
    """Their own sizes count; a family without them, or an engine that names none, says nothing."""
    facts = model_facts({"moe_intermediate_size": 32, "kv_lora_rank": 24, "q_lora_rank": None})
    assert facts == {"moe_intermediate_size": 32, "kv_lora_rank": 24}
    compare_facts(facts, {"hidden_size": 64}, who="the trainer")
    with pytest.raises(WeightMismatchError, match=r"moe_intermediate_size 32 against .* 48"):
        compare_facts(facts, facts | {"moe_intermediate_size": 48}, who="the trainer")


def test_no_config_has_no_facts() -> None:
    """Then nothing is compared."""
    assert model_facts(None) == {}
