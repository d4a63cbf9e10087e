"""Calibrated scales of an FP8 KV cache, as vLLM's loader takes them.

SGLang takes such scales with quantized weights only, and names them as unused otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from vllm.model_executor.layers.attention import Attention

from engine_plugins.errors import UnsupportedError, WeightMismatchError
from engine_plugins.weights.sources.torch_source import hf_boxes
from tests.support.loader_maps import (
    land,
    loaded,
    played_engine,
    receiving,
    same_bits,
    update,
)
from tests.support.loader_maps_vllm import VllmRank
from tests.support.megatron_hf import dense_config, hf_tensors
from tests.support.source_ranks import offered_tensors
from vllm_ext.weight_installer import VllmWeightInstaller

LAYERS = 2
SERVED = {
    "architectures": ["Qwen3ForCausalLM"],
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {},
        "ignore": [],
        "quantization_status": "compressed",
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": "tensor",
            "dynamic": False,
            "symmetric": True,
        },
    },
}
"""A model whose KV cache alone is quantized, as calibration tools write it."""


def scales(layers: int) -> dict[str, torch.Tensor]:
    """Scales of the first layers, each another."""
    return {
        f"model.layers.{layer}.self_attn.{part}_scale": torch.tensor([0.5 + layer + index / 4])
        for layer in range(layers)
        for index, part in enumerate("kv")
    }


def landed(folder: Path, given: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Every scale of the second of two ranks after an update with these, by its parameter."""
    config = dense_config()
    (folder / "config.json").write_text(json.dumps({**config, **SERVED}))
    weights = {name: tensor.bfloat16() for name, tensor in hf_tensors(config).items()}
    expected = {**weights, **given}
    offered = [hf_boxes({name: tensor.clone() for name, tensor in expected.items()})]
    with (
        played_engine() as engine,
        engine.rank(folder, tp_size=2, tp_rank=1, dtype="bfloat16") as rank,
    ):
        live = rank.model()
        wanted = loaded(live, expected)
        land(rank, live, offered)
        for name, parameter in live.named_parameters():
            assert same_bits(parameter, wanted[name]), name
        return {
            name: parameter.item()
            for name, parameter in live.named_parameters()
            if name.endswith("_scale")
        }


def test_what_serves_after_an_update_uses_its_scales(tmp_path: Path) -> None:
    """VLLM deletes the parameters of scales once it has read them; each update reads them anew."""
    config = dense_config(head_dim=32)
    (tmp_path / "config.json").write_text(json.dumps({**config, **SERVED}))
    weights = {name: tensor.bfloat16() for name, tensor in hf_tensors(config).items()}
    memory = {**weights, **scales(LAYERS)}
    with (
        played_engine() as engine,
        engine.rank(tmp_path, tp_size=1, tp_rank=0, dtype="bfloat16") as rank,
        offered_tensors(memory) as trainer,
    ):
        live = rank.model()
        with receiving(rank.installer(live)) as receiver:
            for times in (1, 2, 4):
                for name, tensor in scales(LAYERS).items():
                    memory[name].copy_(tensor * times)
                update(receiver, [trainer])
                used = {
                    name: (each._k_scale.item(), each._v_scale.item(), each._k_scale_float)
                    for name, each in live.named_modules()
                    if isinstance(each, Attention)
                }
                for layer in range(LAYERS):
                    key, value = (0.5 + layer) * times, (0.75 + layer) * times
                    name = f"model.layers.{layer}.self_attn.attn"
                    assert used[name] == (key, value, key)


def test_quantized_weights_are_refused_by_the_layer_that_has_them(tmp_path: Path) -> None:
    """VLLM's reload on the CPU fills them with zeros; nothing is asked of it."""
    config = dense_config(hidden_size=128, head_dim=32, intermediate_size=128)
    whole = {"num_bits": 8, "type": "int", "symmetric": True}
    int8 = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**whole, "strategy": "channel", "dynamic": False},
                "input_activations": {**whole, "strategy": "token", "dynamic": True},
            }
        },
    }
    served = {**config, **SERVED, "quantization_config": int8}
    (tmp_path / "config.json").write_text(json.dumps(served))
    with (
        played_engine() as engine,
        engine.rank(tmp_path, tp_size=1, tp_rank=0, dtype="bfloat16") as rank,
    ):
        assert isinstance(rank, VllmRank)
        installer = VllmWeightInstaller(rank.config, rank.model())
        with pytest.raises(UnsupportedError, match=r"installs zeros, and model\.layers\.0\."):
            installer.trace([])


def test_every_layer_gets_its_scales(tmp_path: Path) -> None:
    """Under the names of the attention that uses them."""
    found = landed(tmp_path, scales(LAYERS))
    for layer in range(LAYERS):
        for index, part in enumerate("kv"):
            name = f"model.layers.{layer}.self_attn.attn.{part}_scale"
            assert found[name] == 0.5 + layer + index / 4


def test_without_scales_the_engine_keeps_its_own(tmp_path: Path) -> None:
    found = landed(tmp_path, {})
    assert f"model.layers.{LAYERS - 1}.self_attn.attn.v_scale" in found


def test_scales_of_some_layers_are_not_enough(tmp_path: Path) -> None:
    """The rest would go on with those of other weights."""
    with pytest.raises(WeightMismatchError, match=r"layers\.1\.self_attn\.k_scale"):
        landed(tmp_path, scales(LAYERS - 1))
