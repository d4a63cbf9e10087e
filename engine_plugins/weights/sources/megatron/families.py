"""The model families whose Megatron parameters are known here: their tables put together.

Where the same parameters go by another `model_type`, the entry is the same family again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine_plugins.weights.sources.megatron.layout import Role, Rows
from engine_plugins.weights.sources.megatron.rules import Rule, Rules
from engine_plugins.weights.sources.megatron.tables import (
    ATTENTION,
    ATTENTION_BIAS,
    EXPERT_BIAS,
    EXPERTS,
    MLA,
    MLP,
    MLP_BIAS,
    MODEL,
    MTP_LAYER,
    NORMS,
    QK_NORM,
    QKV_BIAS,
    SANDWICH_NORMS,
    SHARED_EXPERTS,
    experts,
    fused,
    norm,
    one,
    shared_experts,
    stacked_experts,
)

__all__ = ["FAMILIES", "Family"]

_LAYER = "decoder.layers.{layer}."
_MTP = "mtp.layers.{mtp}."


@dataclass(frozen=True, kw_only=True)
class Family:
    """Tables of one `model_type`.

    Attributes:
        always: rules of every layer, dense and MoE alike.
        when: rules that are there when a flag of the config is set.
        whole: rules of other names than a layer's, or that are whole names already.
        prefix: what stands before a layer's HF names.
        mtp: whether the family has multi-token prediction layers, after the last layer.
        zero_centered: whether HF's norms hold their weight less one, as Megatron's do with
            `layernorm_zero_centered_gamma`. None: they are as the trainer has them, in any case.
        tied: whether head and embedding are one where the config does not say.
        refused: native name -> the class of what maps it elsewhere and is not followed here.
    """

    always: tuple[Rules, ...] = ()
    when: Mapping[str, Rules] = field(default_factory=dict)
    whole: Rules = field(default_factory=lambda: MODEL)
    prefix: str = "model.layers.{layer}."
    mtp: bool = False
    zero_centered: bool | None = False
    tied: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)

    def rules(self, config: Mapping[str, Any]) -> dict[str, Rule]:
        """All rules of a model with this HF config, by their whole native names."""
        optional = [rules for flag, rules in self.when.items() if config.get(flag)]
        layer = {name: rule for rules in (*self.always, *optional) for name, rule in rules.items()}
        found = {_LAYER + name: self._in_layer(rule) for name, rule in layer.items()}
        if self.mtp:
            found |= {_MTP + name: self._in_layer(rule) for name, rule in MTP_LAYER.items()}
            found |= {
                f"{_MTP}transformer_layer.{name}": self._in_layer(rule)
                for name, rule in layer.items()
            }
        return found | dict(self.whole)

    def _in_layer(self, rule: Rule) -> Rule:
        return replace(rule, hf=tuple(self.prefix + name for name in rule.hf))


_DENSE = (NORMS, ATTENTION, MLP)
_SHARED_MOE = (EXPERTS, EXPERT_BIAS, SHARED_EXPERTS)

_LLAMA = Family(always=_DENSE, when={"attention_bias": ATTENTION_BIAS, "mlp_bias": MLP_BIAS})
_DEEPSEEK_V3 = Family(always=(NORMS, MLA, MLP, *_SHARED_MOE), mtp=True)
_QWEN2_SHARED_EXPERT: Rules = {
    **shared_experts("mlp.shared_expert", "shared_expert_intermediate_size"),
    "mlp.shared_experts.gate_weight": one(
        Role.REPLICATED, "mlp.shared_expert_gate.weight", "1", "hidden"
    ),
}
_GPT_OSS: Rules = {
    "self_attention.core_attention.softmax_offset": one(
        Role.COLUMN, "self_attn.sinks", "num_attention_heads"
    ),
    "mlp.router.weight": one(Role.REPLICATED, "mlp.router.weight", "experts", "hidden"),
    "mlp.router.bias": one(Role.REPLICATED, "mlp.router.bias", "experts"),
    **stacked_experts("mlp.experts", "ffn"),
}
_KEYS = "linear_num_key_heads*linear_key_head_dim"
_VALUES = "linear_num_value_heads*linear_value_head_dim"
_DELTA_NET: Rules = {
    "self_attention.in_proj.layer_norm_weight": norm("input_layernorm"),
    "self_attention.in_proj.weight": Rule(
        hf=("linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"),
        role=Role.COLUMN,
        sizes=(
            (f"2*{_KEYS}+2*{_VALUES}", "hidden"),
            ("2*linear_num_value_heads", "hidden"),
        ),
        rows=Rows.DELTA_NET,
        segments=(*_KEYS.split("*"), *_VALUES.split("*")),
    ),
    "self_attention.conv1d.weight": fused(
        Role.COLUMN,
        "linear_attn.conv1d.weight",
        f"2*{_KEYS}+{_VALUES}",
        "1",
        "linear_conv_kernel_dim",
        segments=(_KEYS, _KEYS, _VALUES),
    ),
    "self_attention.A_log": one(Role.COLUMN, "linear_attn.A_log", "linear_num_value_heads"),
    "self_attention.dt_bias": one(Role.COLUMN, "linear_attn.dt_bias", "linear_num_value_heads"),
    # The one norm of the model that HF holds whole.
    "self_attention.out_norm.weight": replace(
        norm("linear_attn.norm", "linear_value_head_dim"), plus=1
    ),
    "self_attention.out_proj.weight": one(
        Role.ROW, "linear_attn.out_proj.weight", "hidden", _VALUES
    ),
}
_GEMMA2 = Family(always=(SANDWICH_NORMS, ATTENTION, MLP), zero_centered=True, tied=True)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family(always=(*_DENSE, QKV_BIAS)),
    "qwen3": Family(always=(*_DENSE, QK_NORM), when={"attention_bias": ATTENTION_BIAS}),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, always=(*_GEMMA2.always, QK_NORM)),
    "mixtral": Family(
        always=(
            NORMS,
            ATTENTION,
            experts("block_sparse_moe", gate="w1", up="w3", down="w2", size="ffn"),
        )
    ),
    "qwen2_moe": Family(always=(*_DENSE, QKV_BIAS, EXPERTS, _QWEN2_SHARED_EXPERT)),
    "qwen3_moe": Family(
        always=(*_DENSE, QK_NORM, EXPERTS), when={"attention_bias": ATTENTION_BIAS}
    ),
    "qwen3_next": Family(
        always=(*_DENSE, QK_NORM, _DELTA_NET, EXPERTS, _QWEN2_SHARED_EXPERT), zero_centered=True
    ),
    "gpt_oss": Family(always=(NORMS, ATTENTION, ATTENTION_BIAS, _GPT_OSS)),
    "glm4_moe": Family(
        always=(*_DENSE, *_SHARED_MOE),
        when={"attention_bias": QKV_BIAS, "use_qk_norm": QK_NORM},
        mtp=True,
    ),
    "deepseek_v2": Family(always=(NORMS, MLA, MLP, EXPERTS, SHARED_EXPERTS)),
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
}
"""`model_type` of the HF config -> its tables."""
