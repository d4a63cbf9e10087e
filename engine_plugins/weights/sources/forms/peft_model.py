"""A model that peft has wrapped: which of its tensors the base model has, and what adapters add.

peft is not imported here: a model of its classes is only there once the trainer has done so. What
its forward pass computes is what counts: adapters that are active, not merged and not disabled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine_plugins.errors import UnsupportedError
from engine_plugins.weights.sources.fsdp_source import fsdp_tensors, reshard
from engine_plugins.weights.sources.wrapper_names import plain_name, unwrapped, without_peft

__all__ = ["Adapted", "Delta", "adapted_weights", "base_model_of", "base_tensors", "has_adapters"]

_MERGE_FIRST = (
    "send a merged model (a copy's merge_and_unload()), or train with plain LoRA of linear layers "
    "and embeddings"
)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What an adapter adds to a weight [rows, columns]: `scale * left @ right`."""

    left: torch.Tensor
    """[rows, rank]; may be a DTensor."""
    right: torch.Tensor
    """[rank, columns]; may be a DTensor."""
    transposed: bool
    """Whether `left` and `right` are of the weight's transpose."""
    scale: float


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A weight of the base model to which adapters add."""

    name: str
    """In the base model."""
    weight: torch.Tensor
    deltas: tuple[Delta, ...]


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has wrapped any part of a model."""
    kinds = _kinds("peft.tuners.tuners_utils", "BaseTunerLayer")
    kinds += _kinds("peft.utils.other", "AuxiliaryTrainingWrapper")
    kinds += _kinds("peft.peft_model", "PeftModel")
    return any(isinstance(module, kinds) for module in model.modules())


def base_model_of(model: nn.Module) -> nn.Module:
    """The model that peft was given, without what is wrapped around it."""
    inner = unwrapped(model)
    if isinstance(inner, _kinds("peft.peft_model", "PeftModel")):
        found: Any = inner
        return unwrapped(found.get_base_model())
    return inner


def base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The base model's parameters and saved buffers under its own names; adapters are left out.

    A module that is trained beside adapters (`modules_to_save`) is given as it is trained; what it
    was tied to has the values from before. A tied parameter is given once.

    Raises:
        UnsupportedError: as for `fsdp_tensors`.
    """
    left_out, renamed = _wrapped_paths(model)
    given: set[int] = set()
    for path, tensor in fsdp_tensors(model, each_place=True):
        if path.startswith(left_out) or id(tensor) in given:
            continue
        given.add(id(tensor))
        for trained, own in renamed.items():
            if path.startswith(trained):
                path = own + path.removeprefix(trained)
                break
        yield without_peft(path), tensor


def adapted_weights(model: nn.Module) -> list[Adapted]:
    """The weights that adapters change now; of FSDP2 the sharded ones.

    Raises:
        UnsupportedError: an adapter of another kind than plain LoRA; a weight that other modules
            have too; a layer that peft would unmerge first.
    """
    reshard(model)
    found = [
        Adapted(
            name=f"{without_peft(path)}.weight",
            weight=layer.base_layer.weight,
            deltas=tuple(_deltas(path, layer)),
        )
        for path, layer in _tuner_layers(model)
        if _active(path, layer)
    ]
    _refuse_other_wrappers(model)
    _refuse_shared(model, found)
    return found


def _active(path: str, layer: Any) -> list[str]:
    """Adapters that a layer's forward pass adds to its base."""
    held = {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, ())}
    if layer.disable_adapters and layer.merged:
        raise UnsupportedError(
            f"{without_peft(path)}: its adapters are merged and disabled at once",
            remedy="call unmerge_adapter() on the model before the update",
        )
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in held]


def _deltas(path: str, layer: Any) -> Iterator[Delta]:
    linear = _kinds("peft.tuners.lora.layer", "Linear")
    embedding = _kinds("peft.tuners.lora.layer", "Embedding")
    name = without_peft(path)
    if type(layer) not in (*linear, *embedding) or hasattr(layer.base_layer, "base_layer"):
        raise UnsupportedError(
            f"{name}: a {type(layer).__module__}.{type(layer).__name__} is not merged here",
            remedy=_MERGE_FIRST,
        )
    for adapter in _active(path, layer):
        variant = getattr(layer, "lora_variant", {}).get(adapter)
        if variant is not None or getattr(layer, "use_dora", {}).get(adapter, False):
            kind = type(variant).__name__ if variant is not None else "DoRA"
            raise UnsupportedError(f"{name}: {kind} is not merged here", remedy=_MERGE_FIRST)
        if type(layer) in embedding:
            parts = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
        else:
            parts = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
            if layer.lora_B[adapter].bias is not None:
                raise UnsupportedError(
                    f"{name}: an adapter with a bias (lora_bias) is not merged here",
                    remedy=_MERGE_FIRST,
                )
        yield Delta(
            left=parts[0],
            right=parts[1],
            transposed=type(layer) in embedding or bool(layer.fan_in_fan_out),
            scale=float(layer.scaling[adapter]),
        )


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    kinds = _kinds("peft.tuners.tuners_utils", "BaseTunerLayer")
    for path, module in unwrapped(model).named_modules():
        if isinstance(module, kinds):
            yield plain_name(path), module


def _training_wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    kinds = _kinds("peft.utils.other", "AuxiliaryTrainingWrapper")
    for path, module in unwrapped(model).named_modules():
        if isinstance(module, kinds):
            yield plain_name(path), module


def _wrapped_paths(model: nn.Module) -> tuple[tuple[str, ...], dict[str, str]]:
    """Beginnings of paths that the base model has not, and of those that it calls otherwise."""
    left_out: list[str] = []
    renamed: dict[str, str] = {}
    for path, layer in _tuner_layers(model):
        kinds = (*layer.adapter_layer_names, *layer.other_param_names)
        left_out += [f"{path}.{kind}." for kind in kinds]
    for path, wrapper in _training_wrappers(model):
        trained = None if wrapper.disable_adapters else next(iter(wrapper.active_adapters), None)
        own = "original_module" if trained is None else f"modules_to_save.{trained}"
        others = [name for name in getattr(wrapper, "modules_to_save", {}) if name != trained]
        left_out += [f"{path}.modules_to_save.{name}." for name in others]
        left_out += [] if trained is None else [f"{path}.original_module."]
        renamed[f"{path}.{own}."] = f"{path}."
    return tuple(left_out), renamed


def _refuse_other_wrappers(model: nn.Module) -> None:
    """What peft puts around a model or its parts that has no weights of the base model's form."""
    plain = _kinds("peft.utils.other", "ModulesToSaveWrapper")
    for path, wrapper in _training_wrappers(model):
        if type(wrapper) not in plain:
            raise UnsupportedError(
                f"{without_peft(path)}: a {type(wrapper).__name__} is not merged here",
                remedy=_MERGE_FIRST,
            )
    for module in model.modules():
        prompts = getattr(module, "prompt_encoder", None)
        if isinstance(module, _kinds("peft.peft_model", "PeftModel")) and prompts:
            raise UnsupportedError(
                "prompts that peft learns are no weights of the model",
                remedy="send a model that was trained with LoRA, or without adapters",
            )


def _refuse_shared(model: nn.Module, adapted: list[Adapted]) -> None:
    """A tied weight: the engine would have the adapter in both places, the trainer in one."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for each in adapted:
        if holders.get(id(each.weight), 0) > 1:
            raise UnsupportedError(
                f"{each.name} is shared with another module, and an adapter changes it in one",
                remedy="leave tied embeddings and heads out of target_modules",
            )


def _kinds(module: str, name: str) -> tuple[type, ...]:
    """A class of peft's, if it is loaded."""
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)
