"""What the rules' size symbols are in one model, from its HF config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from engine_plugins.errors import SourceError
from engine_plugins.weights.sources.megatron.layout import Heads

__all__ = ["Sizes"]


class Sizes:
    """Values of the size symbols, in elements; each is worked out when it is first needed.

    Args:
        fields: the HF config as plain data.

    Raises:
        SourceError: from every method, where the config lacks a size or contradicts itself.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self._known: dict[str, int] = {}

    def __getitem__(self, expression: str) -> int:
        """The value of a symbol, a field of the config, a number, or sums of products of these."""
        if expression not in self._known:
            self._known[expression] = sum(
                prod(self._value(factor) for factor in term.split("*"))
                for term in expression.split("+")
            )
        return self._known[expression]

    def _value(self, word: str) -> int:
        if word.isdecimal():
            return int(word)
        known = _SYMBOLS.get(word)
        return known(self) if known else self.of(word)

    def of(self, *keys: str) -> int:
        """The first of these config fields that is given, a positive integer."""
        value = next((v for key in keys if (v := self._fields.get(key)) is not None), None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SourceError(
                f"the model config gives {' or '.join(keys)} = {value!r}; a positive integer is "
                "needed",
                remedy="give the HF config of the model that Megatron trains",
            )
        return value

    @property
    def heads(self) -> Heads:
        """Attention heads and query groups."""
        heads = self.of("num_attention_heads")
        groups = self.of("num_key_value_heads", "num_attention_heads")
        if heads % groups:
            raise SourceError(
                f"{heads} attention heads do not divide into {groups} key-value heads",
                remedy="check num_attention_heads and num_key_value_heads in the config",
            )
        return Heads(heads=heads, groups=groups)

    def head_dim(self) -> int:
        """Rows of one attention head."""
        if self._fields.get("head_dim") is not None:
            return self.of("head_dim")
        return self["hidden"] // self.of("num_attention_heads")


_SYMBOLS: Mapping[str, Callable[[Sizes], int]] = {
    "hidden": lambda sizes: sizes.of("hidden_size"),
    "vocab": lambda sizes: sizes.of("vocab_size"),
    "head_dim": Sizes.head_dim,
    "q_rows": lambda sizes: sizes.heads.heads * sizes["head_dim"],
    "kv_rows": lambda sizes: sizes.heads.groups * sizes["head_dim"],
    "ffn": lambda sizes: sizes.of("intermediate_size"),
    "experts": lambda sizes: sizes.of("num_experts", "n_routed_experts", "num_local_experts"),
    "expert_ffn": lambda sizes: sizes.of("moe_intermediate_size"),
    "shared_ffn": lambda sizes: sizes.of("n_shared_experts") * sizes["expert_ffn"],
    "q_rank": lambda sizes: sizes.of("q_lora_rank"),
    "kv_rank": lambda sizes: sizes.of("kv_lora_rank"),
    "kv_rank_rope": lambda sizes: sizes["kv_rank"] + sizes.of("qk_rope_head_dim"),
    "mla_q_rows": lambda sizes: (
        sizes.of("num_attention_heads")
        * (sizes.of("qk_nope_head_dim") + sizes.of("qk_rope_head_dim"))
    ),
    "mla_v_rows": lambda sizes: sizes.of("num_attention_heads") * sizes.of("v_head_dim"),
    "mla_kv_rows": lambda sizes: (
        sizes.of("num_attention_heads") * sizes.of("qk_nope_head_dim") + sizes["mla_v_rows"]
    ),
}
