"""A family as Megatron-Bridge maps it, where the trainer has Bridge loaded.

Bridge's registry says for each native parameter which HF tensors it holds, by a mapping object
whose class says how. Those classes that say a layout are turned into rules; one that computes, or
that is unknown, is refused once a parameter of the model needs it. Bridge is read, and never asked
to convert. Source: megatron-bridge 0.3.1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from engine_plugins.errors import UnsupportedError
from engine_plugins.weights.sources.megatron.families import Family
from engine_plugins.weights.sources.megatron.layout import Role, Rows
from engine_plugins.weights.sources.megatron.rules import Rule

__all__ = ["bridge_family"]

_CONVERSION = "megatron.bridge.models.conversion"
_AUTO_MODELS = "transformers.models.auto.modeling_auto"
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")

_PARTS = {"QKVMapping": (Rows.QKV, "qkv"), "GatedMLPMapping": (Rows.GATED, ("gate", "up"))}
_ROLES = {
    "AutoMapping": None,
    "ColumnParallelMapping": Role.COLUMN,
    "RowParallelMapping": Role.ROW,
    "ReplicatedMapping": Role.REPLICATED,
    "DirectMapping": Role.REPLICATED,
}
_MAMBA_INNER = "mamba_num_heads*mamba_head_dim"
_MAMBA_STATE = "n_groups*ssm_state_size"
_GDN_KEYS = "linear_num_key_heads*linear_key_head_dim"
_SEGMENTS = {
    "MambaInProjMapping": (
        _MAMBA_INNER,
        _MAMBA_INNER,
        _MAMBA_STATE,
        _MAMBA_STATE,
        "mamba_num_heads",
    ),
    "MambaConv1dMapping": (_MAMBA_INNER, _MAMBA_STATE, _MAMBA_STATE),
    "GDNConv1dMapping": (_GDN_KEYS, _GDN_KEYS, "linear_num_value_heads*linear_value_head_dim"),
}
"""Stretches of one HF tensor, of each of which a rank holds its share."""


def bridge_family(config: Mapping[str, Any]) -> Family | None:
    """The rules of a model by Bridge's mapping of it.

    Args:
        config: the HF config as plain data; its `architectures`, or what transformers has for its
            `model_type`, name the model's class.

    Returns:
        None where Bridge is not loaded, or does not know the model.

    Raises:
        UnsupportedError: a mapping that Bridge makes of more than is told here.
    """
    conversion = sys.modules.get(f"{_CONVERSION}.model_bridge")
    classes = sys.modules.get(f"{_CONVERSION}.param_mapping")
    known = getattr(getattr(conversion, "get_model_bridge", None), "_exact_types", {})
    wanted = set(_architectures(config))
    made = next(
        (make for kind, make in known.items() if getattr(kind, "__name__", kind) in wanted), None
    )
    if made is None or classes is None:
        return None
    rules: dict[str, Rule] = {}
    refused: dict[str, str] = {}
    for mapping in _mappings(made, config):
        native, numbers = _with_numbers(mapping.megatron_param)
        rule = _rule(native, numbers, mapping, classes)
        if rule is not None:
            rules.setdefault(native, rule)
        elif native not in rules:
            refused[native] = type(mapping).__name__
    tied = not {_VOCABULARY[1]} & (rules.keys() | refused.keys())
    return Family(whole=rules, zero_centered=None, refused=refused, tied=tied)


def _mappings(made: Callable[[object], Any], config: Mapping[str, Any]) -> Iterable[Any]:
    bridge = made(None)
    bridge._hf_config = SimpleNamespace(**config)  # what GLM's mapping asks for its MTP layers
    try:
        found: Iterable[Any] = bridge.mapping_registry().get_all_mappings()
    except Exception as error:
        raise UnsupportedError(
            f"{type(bridge).__name__} of Megatron-Bridge gives no mapping for this config: "
            f"{error!r}",
            remedy=f"register_family({config.get('model_type')!r}, ...) says what it would",
        ) from error
    return found


def _architectures(config: Mapping[str, Any]) -> Iterable[str]:
    said = config.get("architectures")
    if said:
        return list(said)
    names = getattr(sys.modules.get(_AUTO_MODELS), "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {})
    found = names.get(config.get("model_type"))
    return [found] if isinstance(found, str) else list(found or ())


def _with_numbers(pattern: str) -> tuple[str, list[str]]:
    """A name of Bridge's with our words for its stars, and these words in order."""
    numbers: list[str] = []
    parts = pattern.replace(".experts.local_experts.*.", ".experts.").split("*")
    name = parts[0]
    for part in parts[1:]:
        word = "expert"
        if name.endswith((".layers.", "layers.")):
            word = "mtp" if name.startswith("mtp.") else "layer"
        numbers.append(word)
        name += f"{{{word}}}{part}"
    if ".experts.local_experts.*." in pattern:
        numbers.append("expert")
        name += "{expert}"
    return name, numbers


def _rule(native: str, numbers: list[str], mapping: Any, classes: Any) -> Rule | None:
    """The rule that a mapping says; None where its class is not followed here."""
    kind = type(mapping)
    known = getattr(classes, kind.__name__, None) is kind
    if not known or getattr(mapping, "permute_dims", None):
        return None
    hf, expert = mapping.hf_param, "expert" in numbers
    if kind.__name__ in _PARTS and isinstance(hf, Mapping):
        rows, parts = _PARTS[kind.__name__]
        names = tuple(_named(hf[part], numbers) for part in parts)
        if rows is Rows.QKV:
            return Rule(hf=names, role=Role.FUSED_QKV, rows=rows)
        role = Role.EXPERT_COLUMN if expert else Role.COLUMN
        return Rule(hf=names, role=role, rows=rows, expert=expert)
    if not isinstance(hf, str):
        return None
    name = _named(hf, numbers)
    if kind.__name__ in _SEGMENTS:
        return Rule(
            hf=(name,),
            role=Role.COLUMN,
            rows=Rows.SEGMENTS,
            segments=_SEGMENTS[kind.__name__],
        )
    if kind.__name__ not in _ROLES:
        return None
    if native in _VOCABULARY:
        return Rule(hf=(name,), role=Role.VOCABULARY, rows=Rows.PADDED)
    role_said = _ROLES[kind.__name__]
    if expert and role_said not in (None, Role.REPLICATED):
        role_said = Role.EXPERT_COLUMN if role_said is Role.COLUMN else Role.EXPERT_ROW
    return Rule(hf=(name,), role=role_said, expert=expert)


def _named(pattern: str, numbers: list[str]) -> str:
    """An HF name of Bridge's with the native name's words for its stars."""
    first, *rest = pattern.split("*")
    return first + "".join(f"{{{word}}}{part}" for word, part in zip(numbers, rest, strict=True))
