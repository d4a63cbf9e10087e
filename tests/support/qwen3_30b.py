"""A Megatron rank of a Qwen3-30B-A3B-shaped model: shapes and classes, and memory if wanted."""

from __future__ import annotations

import torch

from engine_plugins.weights.sources.megatron.source import MegatronChunk, MegatronRank

__all__ = ["CONFIG", "EXPERTS", "LAYERS", "NARROW", "rank_of"]

LAYERS, EXPERTS, HEADS, GROUPS = 48, 128, 32, 4
CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "head_dim": 128,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": EXPERTS,
    "num_hidden_layers": LAYERS,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
NARROW = CONFIG | {"hidden_size": 8, "head_dim": 2, "moe_intermediate_size": 4, "vocab_size": 16}


def rank_of(config: dict[str, object], *, ep_size: int = 1, device: str = "cpu") -> MegatronRank:
    """The first of `ep_size` ranks, with Transformer Engine's grouped experts and its classes."""
    hidden, head, ffn, vocab = (
        int(str(config[key]))
        for key in ("hidden_size", "head_dim", "moe_intermediate_size", "vocab_size")
    )
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "embedding.word_embeddings.weight": ("VocabParallelEmbedding", (vocab, hidden)),
        "decoder.final_layernorm.weight": ("RMSNorm", (hidden,)),
        "output_layer.weight": ("ColumnParallelLinear", (vocab, hidden)),
    }
    qkv = "TELayerNormColumnParallelLinear"
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (qkv, (hidden,)),
        "self_attention.linear_qkv.weight": (qkv, ((HEADS + 2 * GROUPS) * head, hidden)),
        "self_attention.linear_proj.weight": ("TERowParallelLinear", (hidden, HEADS * head)),
        "self_attention.q_layernorm.weight": ("RMSNorm", (head,)),
        "self_attention.k_layernorm.weight": ("RMSNorm", (head,)),
        "pre_mlp_layernorm.weight": ("RMSNorm", (hidden,)),
        "mlp.router.weight": ("TopKRouter", (EXPERTS, hidden)),
    }
    for expert in range(EXPERTS // ep_size):
        grouped = "mlp.experts.linear_fc"
        layer[f"{grouped}1.weight{expert}"] = ("TEColumnParallelGroupedLinear", (2 * ffn, hidden))
        layer[f"{grouped}2.weight{expert}"] = ("TERowParallelGroupedLinear", (hidden, ffn))
    for number in range(LAYERS):
        shapes |= {f"decoder.layers.{number}.{name}": kind for name, kind in layer.items()}
    chunk = MegatronChunk(
        tensors={name: torch.empty(shape, device=device) for name, (_, shape) in shapes.items()},
        global_layers=range(LAYERS),
        classes={name: kind for name, (kind, _) in shapes.items()},
    )
    return MegatronRank(chunks=[chunk], tp_rank=0, tp_size=1, ep_size=ep_size)
