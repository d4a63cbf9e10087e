"""Large models as configs and HF tensor shapes only; nothing of their size is ever made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor

__all__ = ["ONE_TRILLION", "QWEN3_30B_A3B", "fused", "logical_tensors_of"]

Config = dict[str, Any]
Shapes = Iterator[tuple[str, tuple[int, ...]]]

QWEN3_30B_A3B: Config = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
"""18,867 HF tensors."""

ONE_TRILLION: Config = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.8,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 163840,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "num_nextn_predict_layers": 0,
}
"""61 layers of 384 experts with latent attention: 69,975 HF tensors, 1.03e12 elements."""


def logical_tensors_of(config: Config, dtype: torch.dtype = torch.bfloat16) -> list[LogicalTensor]:
    """A checkpoint's tensors, in its order."""
    return [LogicalTensor(name=name, shape=shape, dtype=dtype) for name, shape in _shapes(config)]


def fused(tensors: Sequence[LogicalTensor]) -> list[LogicalTensor]:
    """The same with a layer's experts in two tensors, as `transformers` holds them."""
    experts: dict[str, int] = {}
    found: dict[str, LogicalTensor] = {}
    for tensor in tensors:
        module, _, expert = tensor.name.partition(".experts.")
        if not expert:
            found[tensor.name] = tensor
            continue
        number, leaf, _ = expert.split(".")
        experts[module] = max(experts.get(module, 0), int(number) + 1)
        if number == "0" and leaf != "up_proj":
            rows, columns = tensor.shape
            name = "gate_up_proj" if leaf == "gate_proj" else leaf
            shape = (2 * rows if leaf == "gate_proj" else rows, columns)
            whole = LogicalTensor(name=f"{module}.experts.{name}", shape=shape, dtype=tensor.dtype)
            found[whole.name] = whole
    for name, tensor in found.items():
        module, _, expert = name.partition(".experts.")
        if expert:
            found[name] = replace(tensor, shape=(experts[module], *tensor.shape))
    return list(found.values())


def _shapes(config: Config) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        attention = _latent_attention if "kv_lora_rank" in config else _attention
        for name, shape in attention(config):
            yield f"{prefix}self_attn.{name}.weight", shape
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        if layer < config.get("first_k_dense_replace", 0):
            yield from _mlp(prefix + "mlp.", config["intermediate_size"], hidden)
        else:
            yield from _experts(config, prefix + "mlp.")
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _attention(config: Config) -> Shapes:
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    yield "q_proj", (heads * head, hidden)
    yield "k_proj", (groups * head, hidden)
    yield "v_proj", (groups * head, hidden)
    yield "o_proj", (hidden, heads * head)
    yield "q_norm", (head,)
    yield "k_norm", (head,)


def _latent_attention(config: Config) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query, latent = config["q_lora_rank"], config["kv_lora_rank"]
    plain, rotary = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value = config["v_head_dim"]
    yield "q_a_proj", (query, hidden)
    yield "q_a_layernorm", (query,)
    yield "q_b_proj", (heads * (plain + rotary), query)
    yield "kv_a_proj_with_mqa", (latent + rotary, hidden)
    yield "kv_a_layernorm", (latent,)
    yield "kv_b_proj", (heads * (plain + value), latent)
    yield "o_proj", (hidden, heads * value)


def _experts(config: Config, prefix: str) -> Shapes:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    count = config.get("num_experts") or config["n_routed_experts"]
    yield prefix + "gate.weight", (count, hidden)
    if "n_routed_experts" in config:
        yield prefix + "gate.e_score_correction_bias", (count,)
        yield from _mlp(prefix + "shared_experts.", inner * config["n_shared_experts"], hidden)
    for expert in range(count):
        yield from _mlp(f"{prefix}experts.{expert}.", inner, hidden)


def _mlp(prefix: str, inner: int, hidden: int) -> Shapes:
    yield prefix + "gate_proj.weight", (inner, hidden)
    yield prefix + "up_proj.weight", (inner, hidden)
    yield prefix + "down_proj.weight", (hidden, inner)
