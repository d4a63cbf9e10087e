"""Native Megatron shards cut from HF tensors, the slow and obvious way.

Written against megatron-core's documented layouts with whole-tensor `cat` and `chunk`, and
shares no code with the source map that it tests. Padding and tied copies are NaN, so that
a leak of either shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engine_plugins.weights.megatron_source import MegatronChunk, MegatronRank

__all__ = ["dense_config", "hf_tensors", "megatron_ranks"]

Tensors = dict[str, torch.Tensor]
Stages = Sequence[Sequence[Sequence[int]]]
"""Per pipeline stage, per virtual chunk, the global layers."""


def dense_config(model_type: str = "qwen3", **changes: Any) -> dict[str, Any]:
    """An HF config as plain data; by default 8 heads of 4 in 4 groups, two layers."""
    return {
        "model_type": model_type,
        "hidden_size": 16,
        "head_dim": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "vocab_size": 37,
        "tie_word_embeddings": False,
    } | changes


def hf_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Random tensors under every name of the model's checkpoint, float32."""
    generator = torch.Generator().manual_seed(seed)
    hidden, vocab, ffn = (config[k] for k in ("hidden_size", "vocab_size", "intermediate_size"))
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_rows = config["num_attention_heads"] * head
    kv_rows = config["num_key_value_heads"] * head
    qkv_bias = config["model_type"] == "qwen2" or config.get("attention_bias")
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_rows, hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.o_proj.weight": (hidden, q_rows),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if config["model_type"] == "qwen3":
        layer |= {f"self_attn.{part}_norm.weight": (head,) for part in "qk"}
    if qkv_bias:
        layer |= {f"self_attn.{part}_proj.bias": (q_rows,) for part in "q"}
        layer |= {f"self_attn.{part}_proj.bias": (kv_rows,) for part in "kv"}
    if config.get("attention_bias"):
        layer["self_attn.o_proj.bias"] = (hidden,)
    if config.get("mlp_bias"):
        layer |= {f"mlp.{part}_proj.bias": (ffn,) for part in ("gate", "up")}
        layer["mlp.down_proj.bias"] = (hidden,)
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def megatron_ranks(
    hf: Tensors,
    config: dict[str, Any],
    *,
    tp_size: int = 1,
    stages: Stages | None = None,
    local_spec: bool = False,
    vocab_multiple: int = 1,
    prefix: str = "",
) -> list[MegatronRank]:
    """Cut HF tensors into what each Megatron rank would hold."""
    layout = stages or [[list(range(config["num_hidden_layers"]))]]
    return [
        MegatronRank(
            tp_rank=tp_rank,
            tp_size=tp_size,
            pp_rank=pp_rank,
            pp_size=len(layout),
            chunks=[
                MegatronChunk(
                    tensors={
                        prefix + name: shards[tp_rank].clone()
                        for name, shards in _chunk(
                            hf, config, layout, (pp_rank, chunk), tp_size, vocab_multiple
                        ).items()
                        for name in [_local_name(name) if local_spec else name]
                    },
                    global_layers=list(layers),
                )
                for chunk, layers in enumerate(layout[pp_rank])
            ],
        )
        for pp_rank in range(len(layout))
        for tp_rank in range(tp_size)
    ]


def _chunk(
    hf: Tensors,
    config: dict[str, Any],
    layout: Stages,
    place: tuple[int, int],
    tp_size: int,
    vocab_multiple: int,
) -> dict[str, list[torch.Tensor]]:
    """Native name -> the shards of all tensor-parallel ranks, for one chunk."""
    pp_rank, chunk = place
    native: dict[str, list[torch.Tensor]] = {}
    embedding = _padded(hf["model.embed_tokens.weight"], vocab_multiple * tp_size)
    if place == (0, 0):
        native["embedding.word_embeddings.weight"] = list(embedding.chunk(tp_size))
    for local, layer in enumerate(layout[pp_rank][chunk]):
        shards = _layer(hf, f"model.layers.{layer}.", config, tp_size)
        native |= {f"decoder.layers.{local}.{name}": value for name, value in shards.items()}
    if place == (len(layout) - 1, len(layout[-1]) - 1):
        native["decoder.final_layernorm.weight"] = [hf["model.norm.weight"]] * tp_size
        if "lm_head.weight" in hf:
            head = _padded(hf["lm_head.weight"], vocab_multiple * tp_size)
            native["output_layer.weight"] = list(head.chunk(tp_size))
        elif place != (0, 0):
            copy = torch.full_like(embedding, torch.nan)
            native["output_layer.weight"] = list(copy.chunk(tp_size))
    return native


def _layer(
    hf: Tensors, prefix: str, config: dict[str, Any], tp_size: int
) -> dict[str, list[torch.Tensor]]:
    def whole(name: str) -> torch.Tensor:
        return hf[prefix + name]

    native = {
        "self_attention.linear_qkv.layer_norm_weight": [whole("input_layernorm.weight")] * tp_size,
        "mlp.linear_fc1.layer_norm_weight": [whole("post_attention_layernorm.weight")] * tp_size,
        "self_attention.linear_proj.weight": whole("self_attn.o_proj.weight").chunk(tp_size, 1),
        "mlp.linear_fc2.weight": whole("mlp.down_proj.weight").chunk(tp_size, 1),
    }
    for leaf in ("weight", "bias"):
        if prefix + f"self_attn.q_proj.{leaf}" in hf:
            grouped = [
                whole(f"self_attn.{part}_proj.{leaf}").chunk(config["num_key_value_heads"])
                for part in "qkv"
            ]
            fused = torch.cat([part for group in zip(*grouped, strict=True) for part in group])
            native[f"self_attention.linear_qkv.{leaf}"] = fused.chunk(tp_size)
        if prefix + f"mlp.gate_proj.{leaf}" in hf:
            gate, up = (whole(f"mlp.{part}_proj.{leaf}").chunk(tp_size) for part in ("gate", "up"))
            native[f"mlp.linear_fc1.{leaf}"] = [
                torch.cat(pair) for pair in zip(gate, up, strict=True)
            ]
    for name, target in (
        ("self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
        ("self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
        ("self_attn.o_proj.bias", "self_attention.linear_proj.bias"),
        ("mlp.down_proj.bias", "mlp.linear_fc2.bias"),
    ):
        if prefix + name in hf:
            native[target] = [whole(name)] * tp_size
    return {name: list(shards) for name, shards in native.items()}


def _padded(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -rows.shape[0] % multiple
    return torch.cat([rows, torch.full((missing, *rows.shape[1:]), torch.nan)])


def _local_name(name: str) -> str:
    """The name in the spec without Transformer Engine."""
    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    return name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
