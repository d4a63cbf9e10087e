"""Two models of 256 MiB for the wire: few large tensors, and very many small ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.coverage import EngineStep

__all__ = ["MODELS", "WireModel", "engine_modules"]

BYTES = 256 << 20
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}
"""Parts of a layer that an engine holds as one module."""
NORMS = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")
ATTENTION = {"q_proj": 4, "k_proj": 1, "v_proj": 1, "o_proj": 4}
DENSE_MLP = {"gate_proj": 10, "up_proj": 10, "down_proj": 10}
"""Sizes of a layer's matrices, relative to each other."""


class WireModel(NamedTuple):
    """A model as its tensors' elements, float32."""

    title: str
    sizes: Callable[[], dict[str, int]]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Random tensors under their names."""
        generator = torch.Generator().manual_seed(0)
        return {name: torch.rand(size, generator=generator) for name, size in self.sizes().items()}


def engine_modules(tensors: Sequence[LogicalTensor]) -> list[EngineStep]:
    """The tensors grouped as an engine's modules hold them: all experts of a layer are one."""
    modules: dict[str, EngineStep] = {}
    for tensor in tensors:
        owner, _, part = tensor.name.rpartition(".")
        module = owner.partition(".experts.")[0]
        if module == owner:
            module = f"{owner}.{FUSED.get(part, part)}"
        modules.setdefault(module, ([module], []))[1].append(tensor)
    return list(modules.values())


def _dense() -> dict[str, int]:
    """400 tensors: 36 layers, embedding and head of an eighth of all."""
    layers = 36
    parts = ATTENTION | DENSE_MLP
    unit = BYTES // 4 // (layers * sum(parts.values()) + 80)
    sizes = {"embed_tokens": 40 * unit, "lm_head": 40 * unit}
    for layer in range(layers):
        sizes |= {f"layers.{layer}.{name}": share * unit for name, share in parts.items()}
        sizes |= {f"layers.{layer}.{norm}": 128 for norm in NORMS}
    return sizes | {"norm": 128, "rotary": 128}


def _experts() -> dict[str, int]:
    """18,867 tensors, as many as Qwen3-30B-A3B has: 48 layers of 128 experts."""
    layers, experts, expert = 48, 128, 56 * 64
    sizes = {"embed_tokens": 128 * 1024, "lm_head": 128 * 1024}
    for layer in range(layers):
        sizes |= {f"layers.{layer}.{name}": share * 2048 for name, share in ATTENTION.items()}
        sizes |= {f"layers.{layer}.{norm}": 64 for norm in NORMS}
        sizes[f"layers.{layer}.router"] = 128 * 64
        for number in range(experts):
            for part in DENSE_MLP:
                sizes[f"layers.{layer}.mlp.experts.{number}.{part}"] = expert
    return sizes | {"norm": 64}


MODELS = [WireModel("dense", _dense), WireModel("experts", _experts)]
