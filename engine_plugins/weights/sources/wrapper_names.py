"""What trainers wrap around a model leaves its mark in names; here they become the model's again.

torch.compile, activation checkpointing and DDP each put a part into the path of a parameter
and change nothing else, so the part is taken out. LoRA (peft) does change what a tensor means: its
names are told apart and never taken for a plain model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from torch import nn

from engine_plugins.errors import SourceError

__all__ = [
    "named_alike",
    "plain_name",
    "refuse_adapters",
    "refuse_value_heads",
    "unwrapped",
    "without_peft",
]

_PARTS = frozenset({"_checkpoint_wrapped_module", "_orig_mod"})
_DATA_PARALLEL = "module"
_PEFT_PREFIX = "base_model.model."
_PEFT_PARTS = ("base_layer", "modules_to_save", "original_module")
_ADAPTERS = ("lora_", "ia3_", "oft_", "hada_", "lokr_", "vera_", "adaption_", "prompt_encoder")
_VALUE_HEADS = ("v_head.", "value_head.")
_SHOWN = 3

Held = TypeVar("Held")


def plain_name(name: str) -> str:
    """A path without what torch.compile and activation checkpointing have put into it."""
    return ".".join(part for part in name.split(".") if part not in _PARTS)


def without_peft(name: str) -> str:
    """The base model's name of a tensor that peft has wrapped; of an adapter's there is none."""
    parts = plain_name(name).removeprefix(_PEFT_PREFIX).split(".")
    return ".".join(part for part in parts if part != "base_layer")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DDP, DataParallel and checkpointing, however nested."""
    while True:
        children = dict(model.named_children())
        name, inner = next(iter(children.items()), ("", model))
        if len(children) != 1 or name not in _PARTS | {_DATA_PARALLEL}:
            return model
        model = inner


def named_alike(pairs: Iterable[tuple[str, Held]]) -> Iterator[tuple[str, Held]]:
    """Give what is named under names without wrappers.

    DDP's `module.` goes where every name begins so: no model names its one part like that.
    """
    found = [(plain_name(name), held) for name, held in pairs]
    prefix = f"{_DATA_PARALLEL}."
    while found and all(name.startswith(prefix) for name, _ in found):
        found = [(name.removeprefix(prefix), held) for name, held in found]
    yield from found


def refuse_adapters(names: Sequence[str]) -> None:
    """Refuse names of a model that peft has wrapped: an engine would serve it without adapters.

    Raises:
        SourceError: names some, and how to merge.
    """
    found = [name for name in names if _is_pefts(name)]
    if found:
        shown = ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
        raise SourceError(
            f"{shown}: names of a model with adapters (peft), which the engine does not have",
            remedy="give the peft model itself to from_hf or from_fsdp with merge_lora=True; or "
            "merge first (model.merge_and_unload()) and give what that returns",
        )


def refuse_value_heads(names: Iterable[str]) -> None:
    """Refuse the heads that reinforcement learning puts beside a language model.

    Raises:
        SourceError: names them.
    """
    found = [name for name in names if plain_name(name).startswith(_VALUE_HEADS)]
    if found:
        raise SourceError(
            f"{', '.join(found[:_SHOWN])}: a value head, which engines do not have",
            remedy="give the language model alone (trl: model.pretrained_model), or choose its "
            "tensors with only=",
        )


def _is_pefts(name: str) -> bool:
    parts = name.split(".")
    return name.startswith(_PEFT_PREFIX) or any(
        part in _PEFT_PARTS or part.startswith(_ADAPTERS) for part in parts
    )
