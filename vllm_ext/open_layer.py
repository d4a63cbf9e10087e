"""One layer of a live vLLM model, opened for its loader and closed over its kernel's tensors.

A layer that is open has memory of its own in the form in which checkpoints are loaded. What serves
is kept aside, and gets the new values when the layer is closed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader.reload import layerwise

from engine_plugins.errors import UnsupportedError
from engine_plugins.weights.loader.engine_tensors import passing_buffers
from engine_plugins.weights.loader.parameter_views import ParameterView

__all__ = ["close_layer", "layer_tensors", "name_loaders", "open_layer", "renew_views"]


def layer_tensors(layer: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """A layer's own parameters and buffers."""
    tensors: dict[str, torch.Tensor] = layerwise.get_layer_tensors(layer)
    return tensors.items()


def open_layer(layer: nn.Module) -> None:
    """Give a layer memory to be loaded into, and the loaders that write there."""
    info = layerwise.get_layerwise_info(layer)
    if not info.can_load():  # it was closed before, in the same update
        _put_aside(layer, info)
    had_none = {name for name, tensor in layer_tensors(layer) if tensor.is_meta}
    layerwise.materialize_layer(layer, info)
    for name, tensor in layer_tensors(layer):
        tensor.weight_loader = layerwise._get_original_loader(tensor)  # type: ignore[attr-defined]
        if name in had_none:
            _keep_what_no_checkpoint_has(tensor, _serving(info).get(name))


def close_layer(layer: nn.Module) -> None:
    """Have a loaded layer processed, and its values copied to where it serves from."""
    info = layerwise.get_layerwise_info(layer)
    serving = _serving(info)
    for name, loaded in passing_buffers(layer).items():
        # vLLM copies one of these only if its own loader saw it loaded.
        if not loaded.is_meta and _alike(loaded, serving.get(name)):
            serving[name].copy_(loaded)
    layerwise._layerwise_process(layer, info)


def renew_views(
    layer: nn.Module,
    views: Mapping[str, Sequence[ParameterView]],
    modules: Mapping[str, nn.Module],
) -> None:
    """Copy what was loaded to tensors that were views of it when the model was built.

    Comes before any layer is closed: then parameters are packed, and what a module of the update
    holds of such a view is copied to where it serves from.

    Args:
        layer: open, and loaded.
        views: of its parameters, by their names in it.
        modules: of the live model, by name.
    """
    for name, loaded in layer_tensors(layer):
        for view in views.get(name, ()):
            values = view.of(loaded.contiguous())
            for held in _held(modules[view.module], view.key):
                if _alike(values, held):
                    held.copy_(values)


def _held(module: nn.Module, key: str) -> list[torch.Tensor]:
    """A tensor beside parameters: what serves, and what an open module has in its place."""
    found = [_serving(layerwise.get_layerwise_info(module)).get(key), getattr(module, key, None)]
    return [each for each in found if isinstance(each, torch.Tensor) and not each.is_meta]


def name_loaders(model: nn.Module) -> None:
    """Look at every weight loader as vLLM's reload will, and name those that have no name.

    The reload asks each for its name and its arguments, of the tensors that serve and of those
    that it has noted of the model as it was built.

    Raises:
        UnsupportedError: one has neither; the reload would fail half way.
    """
    for name, module in model.named_modules():
        noted = layerwise.get_layerwise_info(module).restore_metadata
        tensors = [*layer_tensors(module), *noted[0].items(), *noted[1].items()]
        for key, tensor in tensors:
            loader = getattr(tensor, "weight_loader", None)
            if loader is not None:
                _make_askable(loader, f"{name}.{key}")


def _make_askable(loader: Any, parameter: str) -> None:
    try:
        if not hasattr(loader, "__name__"):
            loader.__name__ = type(loader).__name__
        inspect.signature(loader)
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"vLLM cannot reload {parameter}: of its weight loader, {loader!r}, neither name nor "
            f"arguments can be told ({error})",
            remedy="report it, with the model's name",
        ) from None


def _put_aside(layer: nn.Module, info: layerwise.LayerReloadingInfo) -> None:
    info.kernel_tensors = layerwise.get_layer_params_buffers(layer)
    info.kernel_non_persistent_buffers = set(passing_buffers(layer))
    layerwise.restore_layer_on_meta(layer, info)
    info.load_numel = 0
    info.load_numel_total = layerwise.get_layer_size(layer)


def _serving(info: layerwise.LayerReloadingInfo) -> dict[str, torch.Tensor]:
    """What a layer serves from, by name."""
    parameters, buffers = info.kernel_tensors or ({}, {})
    return {**parameters, **buffers}


def _keep_what_no_checkpoint_has(tensor: torch.Tensor, served: torch.Tensor | None) -> None:
    """Fill new memory with what no loader writes to: padding with zeros, constants with their own.

    vLLM leaves it as it comes from the allocator.
    """
    is_parameter = isinstance(tensor, nn.Parameter)
    if not is_parameter and _alike(tensor, served):
        tensor.copy_(served)  # type: ignore[arg-type]
    elif getattr(tensor, "weight_loader_numel", tensor.numel()) < tensor.numel():
        tensor.zero_()


def _alike(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and one.dtype == other.dtype
