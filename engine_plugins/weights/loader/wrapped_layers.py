"""A model whose layers an engine has wrapped for adapters (LoRA), seen without the wrappers.

A loader knows the layers by the names that they had when the model was built. Behind a wrapper
they have others, and loaders pass over a name that they do not find.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["without_wrappers"]


@contextmanager
def without_wrappers(model: nn.Module, wrapper: type[nn.Module]) -> Iterator[None]:
    """Put every layer that is wrapped in its wrapper's place, for as long as the context lasts.

    Nothing may compute with the model meanwhile.

    Args:
        model: the live one.
        wrapper: the class of the engine's wrappers; each has its layer as `base_layer`, and may
            have registered parameters of the layer as its own.
    """
    places = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if isinstance(child, wrapper)
    ]
    for parent, key, child in places:
        parent._modules[key] = child._modules["base_layer"]
    try:
        yield
    finally:
        for parent, key, child in places:
            child._modules["base_layer"] = parent._modules[key]
            parent._modules[key] = child
            _share_parameters(child)


def _share_parameters(wrapper: nn.Module) -> None:
    """Have a wrapper hold the parameters of its layer that a load may have made anew."""
    layer = wrapper._modules["base_layer"]
    for name in wrapper._parameters:
        if layer is not None and layer._parameters.get(name) is not None:
            wrapper._parameters[name] = layer._parameters[name]
