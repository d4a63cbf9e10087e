"""Tensors beside parameters that an engine's model, as it is built, has in a parameter's memory.

Mamba's `conv_weights` is a view of a layer's weight. Where the engine packs that layer, the weight
gets other memory, and the view stays behind as a copy of what was loaded first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from engine_plugins.weights.loader.engine_tensors import tensors_beside

__all__ = ["ParameterView", "views_of_parameters"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterView:
    """A buffer or attribute, and where it lies in a parameter; offset and strides in elements."""

    module: str
    key: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, loaded: torch.Tensor) -> torch.Tensor:
        """The same view of a contiguous tensor that lies as the parameter did when it was built."""
        start = int(loaded.storage_offset()) + self.offset
        return loaded.detach().as_strided(self.shape, self.strides, start)


def views_of_parameters(model: nn.Module) -> Mapping[str, Sequence[ParameterView]]:
    """The views that a model has, by the parameter's name.

    Args:
        model: as it is built, before its layers are processed for their kernels; on meta or not.
    """
    owners: dict[int, tuple[str, int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_contiguous():
            owners.setdefault(_storage(parameter), (name, int(parameter.storage_offset())))
    found: dict[str, list[ParameterView]] = {}
    for name, tensor in tensors_beside(model).items():
        owner = owners.get(_storage(tensor))
        if owner is None or isinstance(tensor, nn.Parameter):
            continue
        module, _, key = name.rpartition(".")
        view = ParameterView(
            module=module,
            key=key,
            shape=tuple(tensor.shape),
            strides=tuple(tensor.stride()),
            offset=int(tensor.storage_offset()) - owner[1],
        )
        found.setdefault(owner[0], []).append(view)
    return found


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
