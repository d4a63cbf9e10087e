"""Which HF tensors a native parameter of one model holds: the rules, with its numbers in place.

Native names count layers and experts from 0 on each rank; HF names count them over the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.weights.sources.megatron.classes import cut_of
from engine_plugins.weights.sources.megatron.layout import Cut, Heads, Role, Rows
from engine_plugins.weights.sources.megatron.rank import MegatronRank
from engine_plugins.weights.sources.megatron.rules import FAMILIES, IGNORED, MODEL, MTP_LAYER, Rule
from engine_plugins.weights.sources.megatron.sizes import Sizes

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
    r"mlp\.experts\.(?:local_experts\.(\d+)\.linear_fc([12])\.weight|linear_fc([12])\.weight(\d+))"
)
_PLAIN_ROLES = {
    Cut.REPLICATED: Role.REPLICATED,
    Cut.COLUMN: Role.COLUMN,
    Cut.ROW: Role.ROW,
}


class MegatronNames:
    """The name table of one model, from its HF config.

    Args:
        config: the model's HF config, as plain data or a `transformers` object.

    Raises:
        UnsupportedError: a `model_type` without a table.
        SourceError: the config lacks a size or contradicts itself; also from every method.
    """

    def __init__(self, config: HfConfig) -> None:
        fields = config if isinstance(config, Mapping) else config.to_dict()
        self.model_type = str(fields.get("model_type"))
        family = FAMILIES.get(self.model_type)
        if family is None:
            raise UnsupportedError(
                f"no Megatron layout is known for model_type {self.model_type!r}; known: "
                f"{', '.join(SUPPORTED_MODEL_TYPES)}",
                remedy="publish HF-named tensors with WeightSender.from_hf",
            )
        self._sizes = Sizes(fields)
        self._shapes: dict[tuple[tuple[str, ...], ...], list[tuple[int, ...]]] = {}
        self.num_layers = self._sizes.of("num_hidden_layers")
        self._mtp_layers = fields.get("num_nextn_predict_layers")
        self._mtp_rules = MTP_LAYER if family.mtp else {}
        optional = [rules for flag, rules in family.when.items() if fields.get(flag)]
        tables = (*family.always, *optional)
        self._layer_rules = {name: rule for rules in tables for name, rule in rules.items()}
        self._model_rules = dict(MODEL)
        self.tied = bool(fields.get("tie_word_embeddings"))
        if self.tied:  # see `tied_heads`
            self._model_rules["output_layer.weight"] = IGNORED

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
        if match := _LAYER_NAME.fullmatch(native):
            layer = self._global_layer(native, int(match[1]), global_layers)
            return self._in_layer(native, match[2], layer, rank)
        if match := _MTP_NAME.fullmatch(native):
            layer = self._mtp_layer(native, int(match[1]))
            if match[2]:
                return self._in_layer(native, match[3], layer, rank)
            return _prefixed(self._known(native, self._mtp_rules.get(match[3])), layer)
        return self._known(native, self._model_rules.get(native))

    def shapes(self, rule: Rule) -> list[tuple[int, ...]]:
        """Shapes of a rule's HF tensors, in elements."""
        known = self._shapes.get(rule.sizes)
        if known is None:
            known = [tuple(self._sizes[size] for size in sizes) for sizes in rule.sizes]
            self._shapes[rule.sizes] = known
        return known

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

    def _in_layer(self, native: str, name: str, layer: int, rank: MegatronRank) -> Rule:
        match = _EXPERT_NAME.fullmatch(name)
        if match is None:
            return _prefixed(self._known(native, self._layer_rules.get(name)), layer)
        linear, local = match[2] or match[3], int(match[1] or match[4])
        key = f"mlp.experts.linear_fc{linear}.weight{{expert}}"
        rule = self._known(native, self._layer_rules.get(key))
        own = self.local_experts(rank)
        if local >= len(own):
            raise SourceError(
                f"{native}: each of {rank.ep_size} expert-parallel ranks has {len(own)} experts, "
                f"so none numbered {local}",
                remedy="check ep_size and the number of experts in the config",
            )
        return _prefixed(rule, layer, expert=own[local])

    def _known(self, native: str, rule: Rule | None) -> Rule:
        if rule is None:
            raise SourceError(
                f"unknown Megatron parameter {native} for model_type {self.model_type!r}",
                remedy="check the config (its biases, norms and experts) and the model's spec",
            )
        return rule

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
    if cut is None or cut is rule.role.cut:
        return rule
    if cut is not Cut.REPLICATED and (rule.rows is not Rows.PLAIN or rule.role.is_expert):
        raise SourceError(
            f"{native}: a {kind} is cut as {cut.value}, but these are {rule.rows.value} rows of "
            f"role {rule.role.value}",
            remedy="check the model's spec, or say otherwise with class_cuts",
        )
    return replace(rule, role=_PLAIN_ROLES[cut])


def _prefixed(rule: Rule, layer: int, *, expert: int | None = None) -> Rule:
    prefix = f"model.layers.{layer}."
    names = tuple(prefix + hf for hf in rule.hf)
    if expert is not None:
        names = tuple(name.format(expert=expert) for name in names)
    return Rule(role=rule.role, hf=names, sizes=rule.sizes, rows=rule.rows)
