"""Which HF tensors a native Megatron parameter holds: tables, family by family.

Plain data. A parameter is known only if its family's tables have it. Sizes are symbols
(`q_rows`, `ffn`) that `megatron_sizes` gives a value. Every cut is the one that megatron-core
0.16.1 makes by default; a module's class may say another (`megatron_classes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine_plugins.weights.sources.megatron.layout import Role, Rows

__all__ = ["FAMILIES", "IGNORED", "MODEL", "MTP_LAYER", "Family", "Rule", "Rules"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one native parameter is laid out and which HF tensors it holds.

    Attributes:
        role: the cut, and the group that it goes over.
        hf: names of the HF tensors, in the order of the fused rows. In a layer's rule they
            follow `model.layers.{n}.`, and `{expert}` stands for an expert's number.
        sizes: symbols of each HF tensor's shape.
        rows: the order of the rows.
    """

    role: Role
    hf: tuple[str, ...]
    sizes: tuple[tuple[str, ...], ...]
    rows: Rows = Rows.PLAIN


Rules = Mapping[str, Rule]
"""Native name, within its layer if it has one -> rule. `{expert}` as in `Rule.hf`."""


def _one(role: Role, hf: str, *sizes: str, rows: Rows = Rows.PLAIN) -> Rule:
    return Rule(role=role, hf=(hf,), sizes=(sizes,), rows=rows)


def _norm(hf: str, size: str = "hidden") -> Rule:
    return _one(Role.REPLICATED, f"{hf}.weight", size)


def _qkv(leaf: str, *rest: str) -> Rule:
    return Rule(
        role=Role.FUSED_QKV,
        hf=tuple(f"self_attn.{part}_proj.{leaf}" for part in "qkv"),
        sizes=tuple((rows, *rest) for rows in ("q_rows", "kv_rows", "kv_rows")),
        rows=Rows.QKV,
    )


def _gated(role: Role, module: str, leaf: str, size: str, *rest: str) -> Rule:
    return Rule(
        role=role,
        hf=(f"{module}.gate_proj.{leaf}", f"{module}.up_proj.{leaf}"),
        sizes=((size, *rest), (size, *rest)),
        rows=Rows.GATED,
    )


IGNORED = Rule(role=Role.COLUMN, hf=(), sizes=())
"""A copy of something that another parameter publishes."""

MODEL: Rules = {
    "embedding.word_embeddings.weight": _one(
        Role.VOCABULARY, "model.embed_tokens.weight", "vocab", "hidden", rows=Rows.PADDED
    ),
    "decoder.final_layernorm.weight": _norm("model.norm"),
    "output_layer.weight": _one(Role.COLUMN, "lm_head.weight", "vocab", "hidden", rows=Rows.PADDED),
}

MTP_LAYER: Rules = {
    "enorm.weight": _norm("enorm"),
    "hnorm.weight": _norm("hnorm"),
    "eh_proj.weight": _one(Role.COLUMN, "eh_proj.weight", "hidden", "two_hidden"),
    "final_layernorm.weight": _norm("shared_head.norm"),
}
"""Of a multi-token prediction layer, beside the transformer layer that it contains."""

# Transformer Engine fuses norms into the linear that follows; other specs keep them apart.
_NORMS: Rules = {
    "self_attention.linear_qkv.layer_norm_weight": _norm("input_layernorm"),
    "input_layernorm.weight": _norm("input_layernorm"),
    "mlp.linear_fc1.layer_norm_weight": _norm("post_attention_layernorm"),
    "pre_mlp_layernorm.weight": _norm("post_attention_layernorm"),
}
_ATTENTION: Rules = {
    "self_attention.linear_qkv.weight": _qkv("weight", "hidden"),
    "self_attention.linear_proj.weight": _one(
        Role.ROW, "self_attn.o_proj.weight", "hidden", "q_rows"
    ),
}
_MLA: Rules = {
    "self_attention.linear_q_proj.weight": _one(
        Role.COLUMN, "self_attn.q_proj.weight", "mla_q_rows", "hidden"
    ),
    "self_attention.linear_q_down_proj.weight": _one(
        Role.REPLICATED, "self_attn.q_a_proj.weight", "q_rank", "hidden"
    ),
    "self_attention.linear_q_up_proj.layer_norm_weight": _norm("self_attn.q_a_layernorm", "q_rank"),
    "self_attention.q_layernorm.weight": _norm("self_attn.q_a_layernorm", "q_rank"),
    "self_attention.linear_q_up_proj.weight": _one(
        Role.COLUMN, "self_attn.q_b_proj.weight", "mla_q_rows", "q_rank"
    ),
    "self_attention.linear_kv_down_proj.weight": _one(
        Role.REPLICATED, "self_attn.kv_a_proj_with_mqa.weight", "kv_rank_rope", "hidden"
    ),
    "self_attention.linear_kv_up_proj.layer_norm_weight": _norm(
        "self_attn.kv_a_layernorm", "kv_rank"
    ),
    "self_attention.kv_layernorm.weight": _norm("self_attn.kv_a_layernorm", "kv_rank"),
    "self_attention.linear_kv_up_proj.weight": _one(
        Role.COLUMN, "self_attn.kv_b_proj.weight", "mla_kv_rows", "kv_rank"
    ),
    "self_attention.linear_proj.weight": _one(
        Role.ROW, "self_attn.o_proj.weight", "hidden", "mla_v_rows"
    ),
}
_MLP: Rules = {
    "mlp.linear_fc1.weight": _gated(Role.COLUMN, "mlp", "weight", "ffn", "hidden"),
    "mlp.linear_fc2.weight": _one(Role.ROW, "mlp.down_proj.weight", "hidden", "ffn"),
}
_EXPERTS: Rules = {
    "mlp.router.weight": _one(Role.REPLICATED, "mlp.gate.weight", "experts", "hidden"),
    "mlp.experts.linear_fc1.weight{expert}": _gated(
        Role.EXPERT_COLUMN, "mlp.experts.{expert}", "weight", "expert_ffn", "hidden"
    ),
    "mlp.experts.linear_fc2.weight{expert}": _one(
        Role.EXPERT_ROW, "mlp.experts.{expert}.down_proj.weight", "hidden", "expert_ffn"
    ),
}
_EXPERT_BIAS: Rules = {
    "mlp.router.expert_bias": _one(Role.REPLICATED, "mlp.gate.e_score_correction_bias", "experts"),
}
_SHARED_EXPERTS: Rules = {
    "mlp.shared_experts.linear_fc1.weight": _gated(
        Role.COLUMN, "mlp.shared_experts", "weight", "shared_ffn", "hidden"
    ),
    "mlp.shared_experts.linear_fc2.weight": _one(
        Role.ROW, "mlp.shared_experts.down_proj.weight", "hidden", "shared_ffn"
    ),
}
_QKV_BIAS: Rules = {"self_attention.linear_qkv.bias": _qkv("bias")}
_ATTENTION_BIAS: Rules = {
    **_QKV_BIAS,
    "self_attention.linear_proj.bias": _one(Role.REPLICATED, "self_attn.o_proj.bias", "hidden"),
}
_MLP_BIAS: Rules = {
    "mlp.linear_fc1.bias": _gated(Role.COLUMN, "mlp", "bias", "ffn"),
    "mlp.linear_fc2.bias": _one(Role.REPLICATED, "mlp.down_proj.bias", "hidden"),
}
_QK_NORM: Rules = {
    "self_attention.q_layernorm.weight": _norm("self_attn.q_norm", "head_dim"),
    "self_attention.k_layernorm.weight": _norm("self_attn.k_norm", "head_dim"),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Tables of one `model_type`.

    Attributes:
        always: rules of every layer, dense and MoE alike.
        when: rules that are there when a flag of the config is set.
        mtp: whether the family has multi-token prediction layers, after the last layer.
    """

    always: tuple[Rules, ...]
    when: Mapping[str, Rules] = field(default_factory=dict)
    mtp: bool = False


_DENSE = (_NORMS, _ATTENTION, _MLP)
_SHARED_MOE = (_EXPERTS, _EXPERT_BIAS, _SHARED_EXPERTS)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(always=_DENSE, when={"attention_bias": _ATTENTION_BIAS, "mlp_bias": _MLP_BIAS}),
    "qwen2": Family(always=(*_DENSE, _QKV_BIAS)),
    "qwen3": Family(always=(*_DENSE, _QK_NORM), when={"attention_bias": _ATTENTION_BIAS}),
    "qwen3_moe": Family(
        always=(*_DENSE, _QK_NORM, _EXPERTS), when={"attention_bias": _ATTENTION_BIAS}
    ),
    "glm4_moe": Family(
        always=(*_DENSE, *_SHARED_MOE),
        when={"attention_bias": _QKV_BIAS, "use_qk_norm": _QK_NORM},
        mtp=True,
    ),
    "deepseek_v3": Family(always=(_NORMS, _MLA, _MLP, *_SHARED_MOE), mtp=True),
}
"""`model_type` of the HF config -> its tables."""
