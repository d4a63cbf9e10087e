"""Which HF tensors a native Megatron parameter holds, family by family.

Rows of tables, not branches: a parameter is known only if its family's table has it.
Sizes are symbols (`q_rows`, `ffn`) that a model's HF config gives a value, so that every
shard's shape can be checked before anything is published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.weights.megatron_layout import Layout

__all__ = ["SUPPORTED_MODEL_TYPES", "HfConfig", "MegatronNames", "Rule"]


class ConfigObject(Protocol):
    """What is needed of a `transformers` config object."""

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data."""


HfConfig = Mapping[str, Any] | ConfigObject


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one native parameter is laid out and which HF tensors it holds.

    Attributes:
        layout: the cut over ranks.
        hf: names of the HF tensors, in the order of the fused rows. In a layer's rule they
            follow `model.layers.{n}.`.
        sizes: symbols of each HF tensor's shape.
    """

    layout: Layout
    hf: tuple[str, ...]
    sizes: tuple[tuple[str, ...], ...]


def _one(layout: Layout, hf: str, *sizes: str) -> Rule:
    return Rule(layout=layout, hf=(hf,), sizes=(sizes,))


def _qkv(leaf: str, *rest: str) -> Rule:
    return Rule(
        layout=Layout.QKV,
        hf=tuple(f"self_attn.{part}_proj.{leaf}" for part in "qkv"),
        sizes=tuple((rows, *rest) for rows in ("q_rows", "kv_rows", "kv_rows")),
    )


def _gated(leaf: str, *rest: str) -> Rule:
    return Rule(
        layout=Layout.GATED,
        hf=(f"mlp.gate_proj.{leaf}", f"mlp.up_proj.{leaf}"),
        sizes=(("ffn", *rest), ("ffn", *rest)),
    )


_Rules = Mapping[str, Rule]

_INPUT_NORM = _one(Layout.REPLICATED, "input_layernorm.weight", "hidden")
_MLP_NORM = _one(Layout.REPLICATED, "post_attention_layernorm.weight", "hidden")
_IGNORED = Rule(layout=Layout.IGNORED, hf=(), sizes=())

_MODEL: _Rules = {
    "embedding.word_embeddings.weight": _one(
        Layout.VOCAB, "model.embed_tokens.weight", "vocab", "hidden"
    ),
    "decoder.final_layernorm.weight": _one(Layout.REPLICATED, "model.norm.weight", "hidden"),
    "output_layer.weight": _one(Layout.VOCAB, "lm_head.weight", "vocab", "hidden"),
}
_DENSE_LAYER: _Rules = {
    # Transformer Engine fuses the norms into the linears; the local spec keeps them apart.
    "self_attention.linear_qkv.layer_norm_weight": _INPUT_NORM,
    "input_layernorm.weight": _INPUT_NORM,
    "mlp.linear_fc1.layer_norm_weight": _MLP_NORM,
    "pre_mlp_layernorm.weight": _MLP_NORM,
    "self_attention.linear_qkv.weight": _qkv("weight", "hidden"),
    "self_attention.linear_proj.weight": _one(
        Layout.AXIS1, "self_attn.o_proj.weight", "hidden", "q_rows"
    ),
    "mlp.linear_fc1.weight": _gated("weight", "hidden"),
    "mlp.linear_fc2.weight": _one(Layout.AXIS1, "mlp.down_proj.weight", "hidden", "ffn"),
}
_QKV_BIAS: _Rules = {"self_attention.linear_qkv.bias": _qkv("bias")}
_ATTENTION_BIAS: _Rules = {
    **_QKV_BIAS,
    "self_attention.linear_proj.bias": _one(Layout.REPLICATED, "self_attn.o_proj.bias", "hidden"),
}
_MLP_BIAS: _Rules = {
    "mlp.linear_fc1.bias": _gated("bias"),
    "mlp.linear_fc2.bias": _one(Layout.REPLICATED, "mlp.down_proj.bias", "hidden"),
}
_QK_NORM: _Rules = {
    "self_attention.q_layernorm.weight": _one(
        Layout.REPLICATED, "self_attn.q_norm.weight", "head_dim"
    ),
    "self_attention.k_layernorm.weight": _one(
        Layout.REPLICATED, "self_attn.k_norm.weight", "head_dim"
    ),
}


@dataclass(frozen=True, kw_only=True)
class _Family:
    """Tables of one `model_type`: always there, and there when a config flag is set."""

    always: tuple[_Rules, ...]
    when: Mapping[str, _Rules]


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(
        always=(_DENSE_LAYER,),
        when={"attention_bias": _ATTENTION_BIAS, "mlp_bias": _MLP_BIAS},
    ),
    "qwen2": _Family(always=(_DENSE_LAYER, _QKV_BIAS), when={}),
    "qwen3": _Family(always=(_DENSE_LAYER, _QK_NORM), when={"attention_bias": _ATTENTION_BIAS}),
}

SUPPORTED_MODEL_TYPES = tuple(sorted(_FAMILIES))
"""The `model_type`s of HF configs whose Megatron layout is known here."""

_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


class MegatronNames:
    """The name table of one model, from its HF config.

    Args:
        config: the model's HF config, as plain data or a `transformers` object.

    Raises:
        UnsupportedError: a `model_type` without a table.
        SourceError: the config lacks a size or contradicts itself.
    """

    def __init__(self, config: HfConfig) -> None:
        fields = config if isinstance(config, Mapping) else config.to_dict()
        self.model_type = str(fields.get("model_type"))
        family = _FAMILIES.get(self.model_type)
        if family is None:
            raise UnsupportedError(
                f"no Megatron layout is known for model_type {self.model_type!r}; known: "
                f"{', '.join(SUPPORTED_MODEL_TYPES)}",
                remedy="publish HF-named tensors with WeightSender.from_hf",
            )
        self.num_layers = _size(fields, "num_hidden_layers")
        self.query_groups = _size(fields, "num_key_value_heads", "num_attention_heads")
        self._sizes = _sizes(fields, self.query_groups)
        optional = [rules for flag, rules in family.when.items() if fields.get(flag)]
        self._layer_rules = _union(*family.always, *optional)
        self._model_rules = dict(_MODEL)
        if fields.get("tie_word_embeddings"):
            self._model_rules["output_layer.weight"] = _IGNORED

    def find(self, native: str, global_layers: Sequence[int]) -> Rule:
        """The rule of a native parameter, its HF names made whole.

        Args:
            native: name without `module.` prefixes.
            global_layers: global layer number of each local layer of the chunk.

        Raises:
            SourceError: a parameter that this family's table does not have, or a layer
                that the chunk does not have.
        """
        match = _LAYER_NAME.fullmatch(native)
        rule = self._layer_rules.get(match[2]) if match else self._model_rules.get(native)
        if rule is None:
            raise SourceError(
                f"unknown Megatron parameter {native} for model_type {self.model_type!r}",
                remedy="check the config (attention_bias, mlp_bias) and the model's spec",
            )
        if match is None:
            return rule
        local = int(match[1])
        if local >= len(global_layers):
            raise SourceError(
                f"{native}: the chunk has {len(global_layers)} layers, so none numbered {local}",
                remedy="give global_layers one number per local layer",
            )
        prefix = f"model.layers.{global_layers[local]}."
        return Rule(layout=rule.layout, hf=tuple(prefix + hf for hf in rule.hf), sizes=rule.sizes)

    def shapes(self, rule: Rule) -> list[tuple[int, ...]]:
        """Shapes of a rule's HF tensors, in elements."""
        return [tuple(self._sizes[size] for size in sizes) for sizes in rule.sizes]


def _union(*tables: _Rules) -> dict[str, Rule]:
    return {name: rule for table in tables for name, rule in table.items()}


def _sizes(fields: Mapping[str, Any], query_groups: int) -> dict[str, int]:
    """Values of the shape symbols, in elements."""
    hidden = _size(fields, "hidden_size")
    heads = _size(fields, "num_attention_heads")
    if heads % query_groups:
        raise SourceError(
            f"{heads} attention heads do not divide into {query_groups} key-value heads",
            remedy="check num_attention_heads and num_key_value_heads in the config",
        )
    head_dim = hidden // heads if fields.get("head_dim") is None else _size(fields, "head_dim")
    return {
        "hidden": hidden,
        "head_dim": head_dim,
        "q_rows": heads * head_dim,
        "kv_rows": query_groups * head_dim,
        "ffn": _size(fields, "intermediate_size"),
        "vocab": _size(fields, "vocab_size"),
    }


def _size(fields: Mapping[str, Any], key: str, fallback: str | None = None) -> int:
    value = fields.get(key)
    if value is None and fallback is not None:
        return _size(fields, fallback)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SourceError(
            f"the model config gives {key} = {value!r}; a positive integer is needed",
            remedy="give the HF config of the model that Megatron trains",
        )
    return value
