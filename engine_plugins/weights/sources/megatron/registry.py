"""Families that users add: rules as plain data, checked when they are given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from string import Formatter
from typing import Literal

from engine_plugins.errors import SourceError
from engine_plugins.weights.sources.megatron.families import FAMILIES, Family
from engine_plugins.weights.sources.megatron.layout import Cut, Role, Rows
from engine_plugins.weights.sources.megatron.rules import IGNORED, Rule, Rules

__all__ = [
    "GivenRules",
    "MegatronRule",
    "checked_rules",
    "known_model_types",
    "register_family",
    "registered_family",
]

_REGISTERED: dict[str, Family] = {}

_HF_NAMES = {Rows.GATED: 2, Rows.QKV: 3}
"""How many HF tensors a parameter with such rows holds; one otherwise."""
_PLACEHOLDERS = {"layer", "mtp", "expert"}
_SIZE = re.compile(r"\w+(?:[*+]\w+)*")


@dataclass(frozen=True)
class MegatronRule:
    """Which HF tensors a native Megatron parameter holds, and how.

    Attributes:
        hf: name of the HF tensor, or of each in the order of the fused rows: gate and up; q, k
            and v. `{layer}`, `{mtp}` and `{expert}` stand for the numbers in the native name.
        cut: `column` (axis 0), `row` (axis 1) or `replicated`; None: as the class of the module
            that holds the parameter says.
        rows: `plain`; `padded`: the vocabulary, with padding after its end; `gated`: each rank
            holds its own gate and up; `qkv`: by query group; `segments`: each rank holds its
            share of each stretch of one tensor.
        segments: rows of each stretch: whole numbers, fields of the HF config, or products and
            sums of these (`"n_groups*ssm_state_size"`).
        shape: of the whole HF tensor, said as `segments` are; it is then checked. None: what the
            shards say. For `gated` it is that of each of the two.
    """

    hf: str | tuple[str, ...]
    cut: Literal["column", "row", "replicated"] | None = None
    rows: Literal["plain", "padded", "gated", "qkv", "segments"] = "plain"
    segments: tuple[str | int, ...] = ()
    shape: tuple[str | int, ...] | None = None


GivenRules = Mapping[str, MegatronRule | str | None]
"""Whole native name, as `decoder.layers.{layer}.mlp.linear_fc2.weight`, with `weight{expert}` at
the end for an expert's -> its rule; the name of one HF tensor, for a plain parameter that is cut
as its module's class says; or None, for one that is not sent."""


def register_family(
    model_type: str,
    rules: GivenRules | None = None,
    *,
    like: str | None = None,
    zero_centered_norms: bool | None = None,
    replace_known: bool = False,
) -> None:
    """Let `WeightSender.from_megatron` send a family of models, in every process that calls this.

    Args:
        model_type: of the HF config.
        rules: what each native parameter holds; beside those of `like`, where it is given.
        like: a family whose rules hold where `rules` has none; its name for an alias.
        zero_centered_norms: whether the HF norms hold their weight less one, as Gemma's do; the
            trainer must then have `layernorm_zero_centered_gamma`, and may not have it otherwise.
            None: as `like`; without it, no.
        replace_known: whether a family may be replaced that is known already.

    Raises:
        SourceError: a rule that cannot be, an unknown `like`, neither rules nor `like`, or a
            family that is known with other rules.
    """
    base = Family(whole={}) if like is None else registered_family(like)
    if base is None:
        raise SourceError(
            f"{model_type}: like = {like!r} is no known family: {', '.join(known_model_types())}",
            remedy="give a known family, or all rules",
        )
    if not rules and like is None:
        raise SourceError(f"{model_type}: no rules", remedy="give rules, like, or both")
    family = replace(base, whole={**base.whole, **checked_rules(rules or {})})
    if zero_centered_norms is not None:
        family = replace(family, zero_centered=zero_centered_norms)
    if registered_family(model_type) not in (None, family) and not replace_known:
        raise SourceError(
            f"{model_type} is known, with other rules",
            remedy="give replace_known=True, or these rules to one sender with rules=",
        )
    _REGISTERED[model_type] = family


def registered_family(model_type: str) -> Family | None:
    """A family by its `model_type`; what users registered comes first."""
    return _REGISTERED.get(model_type) or FAMILIES.get(model_type)


def known_model_types() -> list[str]:
    """Every `model_type` with rules here, in order."""
    return sorted({*FAMILIES, *_REGISTERED})


def checked_rules(given: GivenRules) -> Rules:
    """Rules as the tables have them.

    Raises:
        SourceError: names the parameter, and what is wrong with its rule.
    """
    return {native: _checked(native, rule) for native, rule in given.items()}


def _checked(native: str, given: MegatronRule | str | None) -> Rule:
    if given is None:
        return IGNORED
    if isinstance(given, str):
        given = MegatronRule(given)
    if not isinstance(given, MegatronRule):
        raise _bad(native, f"a {type(given).__name__} is no rule")
    names = (given.hf,) if isinstance(given.hf, str) else tuple(given.hf)
    try:
        rows = Rows(given.rows)
        cut = None if given.cut is None else Cut(given.cut)
    except ValueError as error:
        raise _bad(native, str(error)) from None
    if len(names) != _HF_NAMES.get(rows, 1):
        raise _bad(native, f"{rows.value} rows hold {_HF_NAMES.get(rows, 1)} tensors: {names}")
    own = _placeholders(native, native)
    for name in names:
        if _placeholders(native, name) - own - ({"layer"} if "mtp" in own else set()):
            raise _bad(native, f"{name} has a number that the native name has not")
    if (rows is Rows.SEGMENTS) != bool(given.segments):
        raise _bad(native, "rows = 'segments' and segments go together")
    if rows is not Rows.PLAIN and cut is Cut.ROW:
        raise _bad(native, f"{rows.value} rows cannot be cut as row")
    expert = "expert" in own
    return Rule(
        hf=names,
        role=None if cut is None else _role(cut, rows, expert=expert),
        sizes=_sizes(native, given, rows),
        rows=rows,
        segments=_expressions(native, given.segments),
        expert=expert,
    )


def _role(cut: Cut, rows: Rows, *, expert: bool) -> Role:
    if expert and cut is not Cut.REPLICATED:
        return Role.EXPERT_COLUMN if cut is Cut.COLUMN else Role.EXPERT_ROW
    if rows is Rows.QKV:
        return Role.FUSED_QKV
    return Role(cut.value)


def _sizes(native: str, given: MegatronRule, rows: Rows) -> tuple[tuple[str, ...], ...] | None:
    if given.shape is None:
        return None
    if rows is Rows.QKV:
        raise _bad(native, "the shapes of q, k and v come from the HF config's heads")
    return (_expressions(native, given.shape),) * _HF_NAMES.get(rows, 1)


def _expressions(native: str, given: tuple[str | int, ...]) -> tuple[str, ...]:
    said = tuple(str(size) for size in given)
    wrong = [size for size in said if not _SIZE.fullmatch(size)]
    if wrong:
        raise _bad(native, f"no size: {wrong[0]!r}")
    return said


def _placeholders(native: str, name: str) -> set[str]:
    try:
        found = {field for _, field, _, _ in Formatter().parse(name) if field is not None}
    except ValueError as error:
        raise _bad(native, f"{name}: {error}") from None
    if found - _PLACEHOLDERS:
        raise _bad(native, f"{name} has {{{min(found - _PLACEHOLDERS)}}}")
    return found


def _bad(native: str, what: str) -> SourceError:
    return SourceError(
        f"rule of {native}: {what}",
        remedy="see MegatronRule; numbers in names are {layer}, {mtp} and {expert}",
    )
