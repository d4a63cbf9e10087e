"""A text model within a model of several parts: the trainer's within the engine's, or back.

The other model is built from its config without memory; the text tower is where a module of the
text model's own class is. Anything but exactly one such place says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from engine_plugins.weights.boxes.model_facts import model_facts

__all__ = ["Renamed", "other_model", "tower_names"]

Renamed = Callable[[str], str | None]
"""The other model's name of a tensor of this one; None where it has none."""


def other_model(model: Any, config: object) -> nn.Module | None:
    """The model that a config is of, without memory; None if it is this one's.

    Args:
        model: the trainer's transformers model.
        config: of what the engine serves, object or dict.
    """
    family = model_facts(config).get("model_type")
    if family is None or family == model.config.model_type:
        return None
    import transformers

    if family not in transformers.CONFIG_MAPPING:
        return None
    if isinstance(config, Mapping):
        config = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        return _built(config)


def _built(config: Any) -> nn.Module | None:
    import transformers

    named = (getattr(transformers, each, None) for each in config.architectures or ())
    known = next((each for each in named if each is not None), None)
    if known is not None:
        made: nn.Module = known._from_config(config)
        return made
    for kind in (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM):
        if type(config) in kind._model_mapping:
            model: nn.Module = kind.from_config(config)
            return model
    return None


def tower_names(own: Any, other: Any) -> Renamed | None:
    """How tensors of one model are called in the other; None if neither has the other's text."""
    inner, there = _base_path(own), _place(_base(own), other)
    if there is not None:
        return lambda name: _moved(name, inner, there)
    outer, here = _base_path(other), _place(_base(other), own)
    if here is None:
        return None
    known = dict(other.state_dict())  # a head beside the tower

    def renamed(name: str) -> str | None:
        if name.startswith(f"{here}."):
            return _moved(name, here, outer)
        return name if name in known else None

    return renamed


def _moved(name: str, before: str, after: str) -> str:
    """A name below one path, below another one; a name beside it stays."""
    start = f"{before}." if before else ""
    return f"{after}.{name[len(start) :]}".removeprefix(".") if name.startswith(start) else name


def _base(model: Any) -> nn.Module:
    found: nn.Module = model.base_model
    return found


def _base_path(model: Any) -> str:
    return "" if _base(model) is model else str(model.base_model_prefix)


def _place(text: nn.Module, model: nn.Module) -> str | None:
    kind = _kind(text)
    paths = [path for path, module in model.named_modules() if path and _kind(module) == kind]
    return paths[0] if len(paths) == 1 else None


def _kind(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")  # what fully_shard makes of a class
