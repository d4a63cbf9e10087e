"""The tables that families share: which HF tensors the parameters of a layer's parts hold.

Names are within a layer, on both sides. Sizes are expressions of `megatron/sizes.py`.
"""

from __future__ import annotations

from engine_plugins.weights.sources.megatron.layout import Role, Rows
from engine_plugins.weights.sources.megatron.rules import Rule, Rules

__all__ = [
    "ATTENTION",
    "ATTENTION_BIAS",
    "EXPERTS",
    "EXPERT_BIAS",
    "MLA",
    "MLP",
    "MLP_BIAS",
    "MODEL",
    "MTP_LAYER",
    "NORMS",
    "QKV_BIAS",
    "QK_NORM",
    "SANDWICH_NORMS",
    "SHARED_EXPERTS",
    "attention",
    "experts",
    "fused",
    "gated",
    "norm",
    "one",
    "shared_experts",
    "stacked_experts",
]


def one(role: Role, hf: str, *sizes: str, rows: Rows = Rows.PLAIN) -> Rule:
    """A parameter that is one HF tensor."""
    return Rule(role=role, hf=(hf,), sizes=(sizes,), rows=rows)


def norm(hf: str, size: str = "hidden") -> Rule:
    """A norm's weight."""
    return one(Role.REPLICATED, f"{hf}.weight", size)


def fused(role: Role, hf: str, rows: str, *rest: str, segments: tuple[str, ...]) -> Rule:
    """A parameter of which each rank holds its share of each stretch of one HF tensor."""
    return Rule(role=role, hf=(hf,), sizes=((rows, *rest),), rows=Rows.SEGMENTS, segments=segments)


def gated(role: Role, names: tuple[str, str], size: str, *rest: str) -> Rule:
    """A gate's and an up projection's tensor in one parameter."""
    return Rule(
        role=role,
        hf=names,
        sizes=((size, *rest), (size, *rest)),
        rows=Rows.GATED,
        expert=role.is_expert,
    )


def _qkv(module: str, leaf: str, *rest: str) -> Rule:
    return Rule(
        role=Role.FUSED_QKV,
        hf=tuple(f"{module}.{part}_proj.{leaf}" for part in "qkv"),
        sizes=tuple((rows, *rest) for rows in ("q_rows", "kv_rows", "kv_rows")),
        rows=Rows.QKV,
    )


def attention(module: str) -> Rules:
    """Attention with query groups."""
    return {
        "self_attention.linear_qkv.weight": _qkv(module, "weight", "hidden"),
        "self_attention.linear_proj.weight": one(
            Role.ROW, f"{module}.o_proj.weight", "hidden", "q_rows"
        ),
    }


def experts(
    module: str,
    *,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    size: str = "expert_ffn",
) -> Rules:
    """A router, and gated experts with a tensor each."""
    expert = f"{module}.experts.{{expert}}"
    return {
        "mlp.router.weight": one(Role.REPLICATED, f"{module}.gate.weight", "experts", "hidden"),
        "mlp.experts.linear_fc1.weight{expert}": gated(
            Role.EXPERT_COLUMN,
            (f"{expert}.{gate}.weight", f"{expert}.{up}.weight"),
            size,
            "hidden",
        ),
        "mlp.experts.linear_fc2.weight{expert}": Rule(
            role=Role.EXPERT_ROW,
            hf=(f"{expert}.{down}.weight",),
            sizes=(("hidden", size),),
            expert=True,
        ),
    }


def shared_experts(module: str, size: str) -> Rules:
    """An expert that every token meets."""
    return {
        "mlp.shared_experts.linear_fc1.weight": gated(
            Role.COLUMN, _gate_and_up(module, "weight"), size, "hidden"
        ),
        "mlp.shared_experts.linear_fc2.weight": one(
            Role.ROW, f"{module}.down_proj.weight", "hidden", size
        ),
    }


def stacked_experts(module: str, size: str) -> Rules:
    """Gated experts, biases too, that HF holds in one tensor for all."""

    def stacked(role: Role, name: str, *sizes: str, rows: Rows) -> Rule:
        return Rule(
            role=role,
            hf=(f"{module}.{name}",),
            sizes=(("experts", *sizes),),
            rows=rows,
            expert=True,
        )

    fc1, fc2 = "mlp.experts.linear_fc1", "mlp.experts.linear_fc2"
    gated, down, up = Rows.STACKED_GATED, Rows.STACKED, Role.EXPERT_COLUMN
    return {
        f"{fc1}.weight{{expert}}": stacked(up, "gate_up_proj", "hidden", f"2*{size}", rows=gated),
        f"{fc1}.bias{{expert}}": stacked(up, "gate_up_proj_bias", f"2*{size}", rows=gated),
        f"{fc2}.weight{{expert}}": stacked(Role.EXPERT_ROW, "down_proj", size, "hidden", rows=down),
        f"{fc2}.bias{{expert}}": stacked(Role.REPLICATED, "down_proj_bias", "hidden", rows=down),
    }


def _gate_and_up(module: str, leaf: str) -> tuple[str, str]:
    return f"{module}.gate_proj.{leaf}", f"{module}.up_proj.{leaf}"


MODEL: Rules = {
    "embedding.word_embeddings.weight": one(
        Role.VOCABULARY, "model.embed_tokens.weight", "vocab", "hidden", rows=Rows.PADDED
    ),
    "decoder.final_layernorm.weight": norm("model.norm"),
    "output_layer.weight": one(Role.COLUMN, "lm_head.weight", "vocab", "hidden", rows=Rows.PADDED),
}
"""Outside of the layers."""

MTP_LAYER: Rules = {
    "enorm.weight": norm("enorm"),
    "hnorm.weight": norm("hnorm"),
    "eh_proj.weight": one(Role.COLUMN, "eh_proj.weight", "hidden", "2*hidden"),
    "final_layernorm.weight": norm("shared_head.norm"),
}
"""Of a multi-token prediction layer, beside the transformer layer that it contains."""

# Transformer Engine fuses norms into the linear that follows; other specs keep them apart.
NORMS: Rules = {
    "self_attention.linear_qkv.layer_norm_weight": norm("input_layernorm"),
    "input_layernorm.weight": norm("input_layernorm"),
    "mlp.linear_fc1.layer_norm_weight": norm("post_attention_layernorm"),
    "pre_mlp_layernorm.weight": norm("post_attention_layernorm"),
}
SANDWICH_NORMS: Rules = {
    "self_attention.linear_qkv.layer_norm_weight": norm("input_layernorm"),
    "input_layernorm.weight": norm("input_layernorm"),
    "self_attention.linear_proj.post_layernorm.weight": norm("post_attention_layernorm"),
    "mlp.linear_fc1.layer_norm_weight": norm("pre_feedforward_layernorm"),
    "pre_mlp_layernorm.weight": norm("pre_feedforward_layernorm"),
    "mlp.linear_fc2.post_layernorm.weight": norm("post_feedforward_layernorm"),
}
"""A norm before and one after each part of a layer."""

ATTENTION = attention("self_attn")
QKV_BIAS: Rules = {"self_attention.linear_qkv.bias": _qkv("self_attn", "bias")}
ATTENTION_BIAS: Rules = {
    **QKV_BIAS,
    "self_attention.linear_proj.bias": one(Role.REPLICATED, "self_attn.o_proj.bias", "hidden"),
}
QK_NORM: Rules = {
    "self_attention.q_layernorm.weight": norm("self_attn.q_norm", "head_dim"),
    "self_attention.k_layernorm.weight": norm("self_attn.k_norm", "head_dim"),
}
MLA: Rules = {
    "self_attention.linear_q_proj.weight": one(
        Role.COLUMN, "self_attn.q_proj.weight", "mla_q_rows", "hidden"
    ),
    "self_attention.linear_q_down_proj.weight": one(
        Role.REPLICATED, "self_attn.q_a_proj.weight", "q_rank", "hidden"
    ),
    "self_attention.linear_q_up_proj.layer_norm_weight": norm("self_attn.q_a_layernorm", "q_rank"),
    "self_attention.q_layernorm.weight": norm("self_attn.q_a_layernorm", "q_rank"),
    "self_attention.linear_q_up_proj.weight": one(
        Role.COLUMN, "self_attn.q_b_proj.weight", "mla_q_rows", "q_rank"
    ),
    "self_attention.linear_kv_down_proj.weight": one(
        Role.REPLICATED, "self_attn.kv_a_proj_with_mqa.weight", "kv_rank_rope", "hidden"
    ),
    "self_attention.linear_kv_up_proj.layer_norm_weight": norm(
        "self_attn.kv_a_layernorm", "kv_rank"
    ),
    "self_attention.kv_layernorm.weight": norm("self_attn.kv_a_layernorm", "kv_rank"),
    "self_attention.linear_kv_up_proj.weight": one(
        Role.COLUMN, "self_attn.kv_b_proj.weight", "mla_kv_rows", "kv_rank"
    ),
    "self_attention.linear_proj.weight": one(
        Role.ROW, "self_attn.o_proj.weight", "hidden", "mla_v_rows"
    ),
}
MLP: Rules = {
    "mlp.linear_fc1.weight": gated(Role.COLUMN, _gate_and_up("mlp", "weight"), "ffn", "hidden"),
    "mlp.linear_fc2.weight": one(Role.ROW, "mlp.down_proj.weight", "hidden", "ffn"),
}
MLP_BIAS: Rules = {
    "mlp.linear_fc1.bias": gated(Role.COLUMN, _gate_and_up("mlp", "bias"), "ffn"),
    "mlp.linear_fc2.bias": one(Role.REPLICATED, "mlp.down_proj.bias", "hidden"),
}
EXPERTS = experts("mlp")
EXPERT_BIAS: Rules = {
    "mlp.router.expert_bias": one(Role.REPLICATED, "mlp.gate.e_score_correction_bias", "experts"),
}
SHARED_EXPERTS = shared_experts("mlp.shared_experts", "shared_ffn")
