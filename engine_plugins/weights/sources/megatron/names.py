"""Which HF tensors a native parameter of one model holds: the rules, with its numbers in place.

Native names count layers and experts from 0 on each rank; HF names count them over the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.weights.sources.megatron.bridge import bridge_family
from engine_plugins.weights.sources.megatron.classes import cut_of
from engine_plugins.weights.sources.megatron.families import FAMILIES, Family
from engine_plugins.weights.sources.megatron.layout import Cut, Heads, Role, Rows, Shard
from engine_plugins.weights.sources.megatron.rank import MegatronRank
from engine_plugins.weights.sources.megatron.registry import (
    GivenRules,
    checked_rules,
    known_model_types,
    registered_family,
)
from engine_plugins.weights.sources.megatron.rules import IGNORED, Rule
from engine_plugins.weights.sources.megatron.sizes import Sizes
from engine_plugins.weights.sources.megatron.wholes import wholes_of

__all__ = ["SUPPORTED_MODEL_TYPES", "HfConfig", "MegatronNames", "classified"]


class ConfigObject(Protocol):
    """What is needed of a `transformers` config object."""

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data."""


HfConfig = Mapping[str, Any] | ConfigObject

SUPPORTED_MODEL_TYPES = tuple(sorted(FAMILIES))
"""The `model_type`s of HF configs whose Megatron layout is known here."""

_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# The transformer layer of an MTP layer is `mtp_model_layer` in newer releases of Megatron.
_MTP_NAME = re.compile(r"mtp\.layers\.(\d+)\.(?:(transformer_layer|mtp_model_layer)\.)?(.+)")
_EXPERT_NAME = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12]\.\w+)|(linear_fc[12]\.[a-z]+)(\d+))"
)
_PLAIN_ROLES = {
    Cut.REPLICATED: Role.REPLICATED,
    Cut.COLUMN: Role.COLUMN,
    Cut.ROW: Role.ROW,
}
_EXPERT_ROLES = {
    Cut.REPLICATED: Role.REPLICATED,
    Cut.COLUMN: Role.EXPERT_COLUMN,
    Cut.ROW: Role.EXPERT_ROW,
}


class MegatronNames:
    """The name table of one model, from its HF config.

    Args:
        config: the model's HF config, as plain data or a `transformers` object.
        rules: rules of its own, which come before all others.

    Raises:
        UnsupportedError: a `model_type` without a table.
        SourceError: the config lacks a size or contradicts itself, or a rule that cannot be; also
            from every method.
    """

    def __init__(self, config: HfConfig, rules: GivenRules | None = None) -> None:
        fields = config if isinstance(config, Mapping) else config.to_dict()
        self.model_type = str(fields.get("model_type"))
        own = checked_rules(rules or {})
        family = self._family(fields, alone=bool(own))
        self._sizes = Sizes(fields)
        self._shapes: dict[tuple[tuple[str, ...], ...], list[tuple[int, ...]]] = {}
        self.num_layers = self._sizes.of("num_hidden_layers")
        self.zero_centered = family.zero_centered
        self._mtp_layers = fields.get("num_nextn_predict_layers")
        self._rules = {**family.rules(fields), **own}
        self._refused = family.refused
        tied = fields.get("tie_word_embeddings")
        self.tied = family.tied if tied is None else bool(tied)
        if self.tied:  # see `tied_heads`
            self._rules["output_layer.weight"] = IGNORED

    def _family(self, fields: Mapping[str, Any], *, alone: bool) -> Family:
        """The first that knows the model: the tables, Bridge, or the rules given alone."""
        family = registered_family(self.model_type) or bridge_family(fields)
        if family is None and alone:
            family = Family(whole={})
        if family is None:
            raise UnsupportedError(
                f"no Megatron layout is known for model_type {self.model_type!r}; known: "
                f"{', '.join(known_model_types())}",
                remedy="say which HF tensors its parameters hold, with "
                f"engine_plugins.register_family({self.model_type!r}, ...) or "
                "from_megatron(rules=...), with like= for an alias; or import megatron.bridge, "
                "whose mapping is then used where it knows the model; or publish HF-named tensors "
                "with WeightSender.from_hf",
            )
        return family

    def find(self, native: str, rank: MegatronRank, global_layers: Sequence[int]) -> Rule:
        """The rule of a native parameter, its HF names made whole.

        Args:
            native: name without `module.` prefixes.
            rank: the rank that holds it; says which experts are its own.
            global_layers: global layer number of each local layer of the chunk.

        Raises:
            SourceError: a parameter that this family's tables do not have, or a layer or expert
                that the model does not have.
        """
        numbers: dict[str, int] = {}
        key = native
        if match := _LAYER_NAME.fullmatch(native):
            numbers["layer"] = self._global_layer(native, int(match[1]), global_layers)
            key = f"decoder.layers.{{layer}}.{self._within(native, match[2], rank, numbers)}"
        elif match := _MTP_NAME.fullmatch(native):
            numbers["mtp"] = int(match[1])
            numbers["layer"] = self._mtp_layer(native, int(match[1]))
            inner = "transformer_layer." if match[2] else ""
            key = f"mtp.layers.{{mtp}}.{inner}{self._within(native, match[3], rank, numbers)}"
        rule = self._rules.get(key) or self._rules.get(self._with_mtp(key, numbers))
        if rule is None:
            raise self._unknown(native, key)
        if not numbers:
            return rule
        return Rule(
            role=rule.role,
            hf=tuple([name.format_map(numbers) for name in rule.hf]),
            sizes=rule.sizes,
            rows=rule.rows,
            segments=rule.segments,
            expert=rule.expert,
            number=numbers.get("expert", 0),
            plus=rule.plus,
        )

    @staticmethod
    def _with_mtp(key: str, numbers: Mapping[str, int]) -> str:
        """The key under which Bridge has a multi-token prediction layer: with its number."""
        return key.replace("{mtp}", str(numbers["mtp"])) if "mtp" in numbers else key

    def _unknown(self, native: str, key: str) -> SourceError | UnsupportedError:
        said = f"for it, give from_megatron(rules={{{key!r}: ...}})"
        if key in self._refused:
            return UnsupportedError(
                f"{native}: Megatron-Bridge maps it with a {self._refused[key]}, which is more "
                "than a layout, and is not followed here",
                remedy=f"{said}; or publish HF-named tensors with WeightSender.from_hf",
            )
        return SourceError(
            f"unknown Megatron parameter {native} for model_type {self.model_type!r}",
            remedy=f"check the config (its biases, norms and experts) and the model's spec; {said}",
        )

    def shapes(self, rule: Rule, shard: Shard) -> list[tuple[int, ...]]:
        """Shapes of a rule's HF tensors, in elements; what nobody said is as the shard says."""
        if rule.sizes is None:
            return wholes_of(rule, shard, self._sizes)
        known = self._shapes.get(rule.sizes)
        if known is None:
            known = [tuple(self._sizes[size] for size in sizes) for sizes in rule.sizes]
            self._shapes[rule.sizes] = known
        return known

    def segments(self, rule: Rule) -> list[int]:
        """The numbers of a rule's `segments`."""
        return [self._sizes[size] for size in rule.segments]

    @property
    def hidden(self) -> int:
        """The hidden size."""
        return self._sizes["hidden"]

    def heads(self, rule: Rule) -> Heads | None:
        """The attention heads, for a rule that needs them."""
        return self._sizes.heads if rule.rows is Rows.QKV else None

    def local_experts(self, rank: MegatronRank) -> range:
        """Numbers of the experts that a rank holds, counted over the model.

        Megatron gives each expert-parallel rank an equal run of them.
        """
        experts = self._sizes["experts"]
        if experts % rank.ep_size:
            raise SourceError(
                f"{experts} experts cannot be divided among {rank.ep_size} expert-parallel ranks",
                remedy="check ep_size and the number of experts in the config",
            )
        count = experts // rank.ep_size
        return range(rank.ep_rank * count, (rank.ep_rank + 1) * count)

    def _within(self, native: str, name: str, rank: MegatronRank, numbers: dict[str, int]) -> str:
        """A name within a layer, an expert's number taken out of it and counted over the model."""
        match = _EXPERT_NAME.fullmatch(name)
        if match is None:
            return name
        leaf, local = match[2] or match[3], int(match[1] or match[4])
        own = self.local_experts(rank)
        if local >= len(own):
            raise SourceError(
                f"{native}: each of {rank.ep_size} expert-parallel ranks has {len(own)} experts, "
                f"so none numbered {local}",
                remedy="check ep_size and the number of experts in the config",
            )
        numbers["expert"] = own[local]
        return f"mlp.experts.{leaf}{{expert}}"

    def _global_layer(self, native: str, local: int, global_layers: Sequence[int]) -> int:
        if local >= len(global_layers):
            raise SourceError(
                f"{native}: the chunk has {len(global_layers)} layers, so none numbered {local}",
                remedy="give global_layers one number per local layer",
            )
        return global_layers[local]

    def _mtp_layer(self, native: str, index: int) -> int:
        """MTP layers are numbered after the model's own, and all live in one chunk."""
        if isinstance(self._mtp_layers, int) and index >= self._mtp_layers:
            raise SourceError(
                f"{native}: the config gives num_nextn_predict_layers = {self._mtp_layers}",
                remedy="give the HF config of the model that Megatron trains",
            )
        return self.num_layers + index


def classified(native: str, rule: Rule, rank: MegatronRank, kind: str | None) -> Rule:
    """The rule, with the cut that the class of the parameter's module makes.

    Args:
        native: the parameter's name.
        rule: what its name says.
        rank: for its `class_cuts`.
        kind: the class's name; None if it is not known: the name then decides.

    Raises:
        SourceError: an unknown class, or one that cuts what cannot be cut so.
    """
    cut = cut_of(kind, native, rank.class_cuts) if kind else None
    if rule.role is None:
        if cut is None:
            return rule
        if cut is Cut.ROW and rule.rows is not Rows.PLAIN:
            raise _contradiction(native, rule, kind, cut)
        return replace(rule, role=(_EXPERT_ROLES if rule.expert else _PLAIN_ROLES)[cut])
    if cut is None or cut is rule.role.cut:
        return rule
    if cut is not Cut.REPLICATED and (rule.rows is not Rows.PLAIN or rule.role.is_expert):
        raise _contradiction(native, rule, kind, cut)
    return replace(rule, role=_PLAIN_ROLES[cut])


def _contradiction(native: str, rule: Rule, kind: str | None, cut: Cut) -> SourceError:
    role = f" of role {rule.role.value}" if rule.role else ""
    return SourceError(
        f"{native}: a {kind} is cut as {cut.value}, but these are {rule.rows.value} rows{role}",
        remedy="check the model's spec, or say otherwise with class_cuts",
    )
