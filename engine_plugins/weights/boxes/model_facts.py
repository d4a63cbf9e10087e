"""Facts of a Hugging Face config that a trainer and an engine can compare before any byte moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine_plugins.errors import WeightMismatchError

__all__ = ["MODEL_FACTS", "compare_facts", "model_facts"]

MODEL_FACTS: dict[str, tuple[str, ...]] = {
    "model_type": ("model_type",),
    "hidden_size": ("hidden_size",),
    "num_hidden_layers": ("num_hidden_layers",),
    "vocab_size": ("vocab_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size",),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "moe_intermediate_size": ("moe_intermediate_size",),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "tie_word_embeddings": ("tie_word_embeddings",),
}
"""Fact -> the names under which HF configs hold it, first found first."""

_OTHER_MODEL = "connect to the engine that serves the trainer's model"
_TOWER = (
    "give from_hf or from_fsdp the config of the model that the engine serves (config=FOLDER), by "
    "which the text is found in the whole; and only='*' if the trainer does not hold the rest"
)
_NESTED = ("text_config", "llm_config", "language_config")


def model_facts(config: object) -> dict[str, str | int | bool]:
    """Read the comparable facts of a config.

    A model of several parts keeps its language model's facts in a nested config; those are
    preferred, except for `model_type`, which names the whole model.

    Args:
        config: a HF config object, its dict, or None.

    Returns:
        Plain values only; a fact that the config lacks, or that is no str, int or bool, is
        left out, and says nothing.
    """
    nested = next((part for name in _NESTED if (part := _get(config, name)) is not None), None)
    facts: dict[str, str | int | bool] = {}
    for fact, names in MODEL_FACTS.items():
        parts = (config, nested) if fact == "model_type" else (nested, config)
        values = (_get(part, name) for part in parts for name in names)
        value = next((value for value in values if isinstance(value, str | int)), None)
        if value is not None:
            facts[fact] = value
    return facts


def compare_facts(
    offered: Mapping[str, str | int | bool], own: Mapping[str, str | int | bool], *, who: str
) -> None:
    """Check that a trainer speaks of the model that this engine serves.

    Facts that either side does not state are not compared.

    Raises:
        WeightMismatchError: names every fact that differs, with both values.
    """
    differing = [
        f"{fact} {offered[fact]!r} against this engine's {own[fact]!r}"
        for fact in offered.keys() & own.keys()
        if offered[fact] != own[fact]
    ]
    if differing:
        raise WeightMismatchError(
            f"{who} offers another model: {', '.join(sorted(differing))}",
            remedy=_TOWER if _is_text_of_the_other(offered, own) else _OTHER_MODEL,
        )


def _is_text_of_the_other(
    offered: Mapping[str, str | int | bool], own: Mapping[str, str | int | bool]
) -> bool:
    """Whether the names of the families differ by `_text`: text and whole of one model."""
    names = {str(each.get("model_type")) for each in (offered, own)}
    return len(names) == 2 and len({name.removesuffix("_text") for name in names}) == 1


def _get(config: object, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    return getattr(config, name, None)
