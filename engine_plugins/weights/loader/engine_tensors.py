"""What an engine's model keeps beside its parameters: buffers, and tensors set as attributes.

Loaders fill some of them from the checkpoint (a layer's scalar, a router's correction bias), and
derive others from parameters (Gemma's weight + 1).
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet

import torch
from torch import nn

__all__ = ["ModelParameters", "passing_buffers", "saved_buffers", "tensors_beside"]

_NEVER_SAVED = re.compile(r"(^|\.)(_[^.]*|inv_freq|cos_cached|sin_cached|cos_sin_cache)$")
"""Buffers that are an engine's own business, though it may have registered them as persistent."""


class ModelParameters(dict[str, torch.Tensor]):
    """A model's parameters by name, and the model.

    Args:
        model: the model.
        made_anew: names of tensors beside them that the engine derives anew at the end of every
            update; it may grow while the loader runs.
    """

    def __init__(self, model: nn.Module, made_anew: AbstractSet[str] = frozenset()) -> None:
        super().__init__(model.named_parameters())
        self.model = model
        self.made_anew = made_anew


def tensors_beside(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of a model that are no parameters, by the module's name and their own."""
    found = dict(model.named_buffers())
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found[f"{name}.{key}".lstrip(".")] = value
    return found


def saved_buffers(model: nn.Module) -> set[str]:
    """Buffers that a checkpoint may hold."""
    return {
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        for key in module._buffers.keys() - module._non_persistent_buffers_set
        if module._buffers[key] is not None and not _NEVER_SAVED.search(key)
    }


def passing_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own buffers that no checkpoint has."""
    names = module._non_persistent_buffers_set
    return {key: each for key, each in module._buffers.items() if key in names and each is not None}
