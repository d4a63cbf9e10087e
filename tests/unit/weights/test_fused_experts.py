"""transformers' fused experts under checkpoint names; shares of them: `test_dtensor_source`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from engine_plugins.errors import SourceError
from engine_plugins.weights.boxes.placement import assemble
from engine_plugins.weights.sources.torch_source import hf_boxes
from tests.support.megatron_fixtures import read_safetensors

TINY = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "tie_word_embeddings": False,
}
MOE_CONFIGS = [
    Qwen3MoeConfig(**TINY, num_experts=3, head_dim=4),
    Qwen2MoeConfig(**TINY, num_experts=3, shared_expert_intermediate_size=6),
    Glm4MoeConfig(**TINY, n_routed_experts=4, head_dim=4, first_k_dense_replace=1),
    DeepseekV3Config(
        **TINY,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=4,
        kv_lora_rank=4,
        qk_nope_head_dim=4,
        qk_rope_head_dim=2,
        v_head_dim=4,
    ),
]


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return read_safetensors(folder / "model.safetensors")


@pytest.mark.parametrize("config", MOE_CONFIGS, ids=lambda config: config.model_type)
def test_fused_experts_are_published_as_the_checkpoint_names_them(
    config: Any, tmp_path: Path
) -> None:
    """Names and bits equal what `save_pretrained` writes, and no value is copied."""
    model = AutoModelForCausalLM.from_config(config)
    boxes = hf_boxes(model.state_dict())

    rebuilt, expected = assemble(boxes), saved(model, tmp_path)
    assert any(".mlp.experts.2.up_proj.weight" in name for name in expected)
    assert sorted(rebuilt) == sorted(expected)
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in expected.items())

    storages = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert {box.data.untyped_storage().data_ptr() for box in boxes} == storages


def experts(gate_up: tuple[int, ...], down: tuple[int, ...]) -> dict[str, torch.Tensor]:
    prefix = "model.layers.0.mlp.experts"
    return {
        f"{prefix}.gate_up_proj": torch.zeros(gate_up),
        f"{prefix}.down_proj": torch.zeros(down),
    }


@pytest.mark.parametrize(
    "tensors",
    [
        experts((2, 8, 12), (2, 6, 8)),
        experts((2, 12, 8), (3, 8, 6)),
        experts((2, 12), (2, 8, 6)),
        {"model.layers.0.mlp.experts.down_proj": torch.zeros(2, 8, 6)},
        {"model.layers.0.mlp.gate_up_proj.weight": torch.zeros(12, 8)},
    ],
    ids=["other_axes", "other_experts", "flat", "alone", "dense"],
)
def test_other_fused_tensors_are_left_alone(tensors: dict[str, torch.Tensor]) -> None:
    """gpt_oss names its fused experts alike, but lies and is saved otherwise."""
    assert [box.name for box in hf_boxes(tensors)] == list(tensors)


def test_an_expert_given_twice_is_an_error() -> None:
    name = "model.layers.0.mlp.experts.1.gate_proj.weight"
    tensors = experts((2, 12, 8), (2, 8, 6)) | {name: torch.zeros(6, 8)}
    with pytest.raises(SourceError, match=f"{name}: given on its own and inside"):
        hf_boxes(tensors)
