"""HF configs of tiny models as plain data, and random tensors under their checkpoints' names."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["dense_config", "hf_tensors", "moe_config", "moe_layers"]

Shapes = dict[str, tuple[int, ...]]


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


_MOE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [], "decoder_sparse_step": 1},
    "glm4_moe": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 8,
        "q_lora_rank": 12,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 6,
    },
}


def moe_config(model_type: str = "qwen3_moe", **changes: Any) -> dict[str, Any]:
    """An HF config of a family with experts, ffn 8 each; the first layer dense or not."""
    base = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return dense_config(model_type) | base | _MOE[model_type] | changes


def moe_layers(config: dict[str, Any]) -> range:
    """Layers with experts, those for multi-token prediction among them."""
    count = config["num_hidden_layers"] + (config.get("num_nextn_predict_layers") or 0)
    if "moe_intermediate_size" not in config:
        return range(0)
    return range(config.get("first_k_dense_replace", 0), count)


def hf_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under every name of the model's checkpoint, float32."""
    generator = torch.Generator().manual_seed(seed)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    layers = config["num_hidden_layers"]
    mtp = range(layers, layers + (config.get("num_nextn_predict_layers") or 0))
    for number in (*range(layers), *mtp):
        layer = _layer(config, number) | (_mtp(hidden) if number in mtp else {})
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _mtp(hidden: int) -> Shapes:
    norms = ("enorm", "hnorm", "shared_head.norm")
    return {f"{norm}.weight": (hidden,) for norm in norms} | {
        "eh_proj.weight": (hidden, 2 * hidden)
    }


def _layer(config: dict[str, Any], number: int) -> Shapes:
    hidden = config["hidden_size"]
    norms = ("input_layernorm", "post_attention_layernorm")
    shapes: Shapes = {f"{norm}.weight": (hidden,) for norm in norms}
    shapes |= _mla(config) if "kv_lora_rank" in config else _attention(config)
    if number not in moe_layers(config):
        return shapes | _mlp(
            "mlp", hidden, config["intermediate_size"], bias=config.get("mlp_bias")
        )
    experts = config.get("num_experts") or config["n_routed_experts"]
    ffn = config["moe_intermediate_size"]
    shapes["mlp.gate.weight"] = (experts, hidden)
    for expert in range(experts):
        shapes |= _mlp(f"mlp.experts.{expert}", hidden, ffn)
    if "n_shared_experts" in config:
        shapes["mlp.gate.e_score_correction_bias"] = (experts,)
        shapes |= _mlp("mlp.shared_experts", hidden, ffn * config["n_shared_experts"])
    return shapes


def _attention(config: dict[str, Any]) -> Shapes:
    hidden, family = config["hidden_size"], config["model_type"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    values = config["num_attention_heads"] * head
    rows = {"q": values * (2 if config.get("attention_gate") else 1)}
    rows |= dict.fromkeys("kv", config["num_key_value_heads"] * head)
    shapes: Shapes = {f"self_attn.{part}_proj.weight": (rows[part], hidden) for part in rows}
    shapes["self_attn.o_proj.weight"] = (hidden, values)
    if family in ("qwen3", "qwen3_moe") or config.get("use_qk_norm"):
        shapes |= {f"self_attn.{part}_norm.weight": (head,) for part in "qk"}
    if family == "qwen2" or config.get("attention_bias"):
        shapes |= {f"self_attn.{part}_proj.bias": (rows[part],) for part in rows}
    if config.get("attention_bias") and family != "glm4_moe":
        shapes["self_attn.o_proj.bias"] = (hidden,)
    return shapes


def _mla(config: dict[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    key, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value, rank, q_rank = config["v_head_dim"], config["kv_lora_rank"], config["q_lora_rank"]
    shapes: Shapes = {
        "kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (key + value), rank),
        "o_proj.weight": (hidden, heads * value),
    }
    if q_rank:
        shapes["q_a_proj.weight"] = (q_rank, hidden)
        shapes["q_a_layernorm.weight"] = (q_rank,)
        shapes["q_b_proj.weight"] = (heads * (key + rope), q_rank)
    else:
        shapes["q_proj.weight"] = (heads * (key + rope), hidden)
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _mlp(module: str, hidden: int, ffn: int, *, bias: bool | None = None) -> Shapes:
    shapes: Shapes = {f"{module}.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}
    shapes[f"{module}.down_proj.weight"] = (hidden, ffn)
    if bias:
        shapes |= {f"{module}.{part}_proj.bias": (ffn,) for part in ("gate", "up")}
        shapes[f"{module}.down_proj.bias"] = (hidden,)
    return shapes
