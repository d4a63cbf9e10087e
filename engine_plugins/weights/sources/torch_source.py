"""The trainer's torch tensors as a source: whole HF-named tensors, and DTensors' local shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import nn

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.sources.dtensor_source import is_dtensor, shard_boxes
from engine_plugins.weights.sources.fsdp_source import fsdp_tensors, refuse_fsdp1_names
from engine_plugins.weights.sources.fused_experts import split_fused_experts
from engine_plugins.weights.sources.hf_model import CheckpointNames
from engine_plugins.weights.sources.module_tensors import ModuleTensors
from engine_plugins.weights.sources.only import Only
from engine_plugins.weights.sources.wrapper_names import (
    named_alike,
    refuse_adapters,
    refuse_value_heads,
)

__all__ = ["HfWeights", "hf_boxes", "looked_at_anew", "plain_view"]

NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
HfWeights = nn.Module | Callable[[], NamedTensors] | NamedTensors


def looked_at_anew(weights: HfWeights) -> Callable[[], NamedTensors]:
    """Make a function that gives named tensors as they are at each call.

    Args:
        weights: a model, or a function, either of which is asked each time; or the tensors
            themselves, which stay these objects.

    Raises:
        SourceError: what is neither; or a generator that has nothing (any more).
    """
    if isinstance(weights, nn.Module):
        return ModuleTensors(weights, fsdp_tensors)
    if callable(weights):
        return weights
    given: object = weights
    if isinstance(weights, Mapping):
        kept: NamedTensors = dict(weights)
    elif isinstance(given, Iterable) and not isinstance(given, str | bytes | torch.Tensor):
        kept = list(given)
        if not kept and isinstance(weights, Iterator):
            raise SourceError(
                "no tensors given: the generator had none (was it used up before?)",
                remedy="give the model itself, or a new model.named_parameters()",
            )
    else:
        raise SourceError(
            f"a {type(weights).__name__} is no model and no named tensors",
            remedy="give the HF model itself, or a function or dict that gives its named tensors",
        )
    return lambda: kept


def hf_boxes(
    named_tensors: NamedTensors,
    *,
    names: CheckpointNames | None = None,
    only: Only | None = None,
) -> list[SourceBox]:
    """Describe HF-named tensors as a source, without copying any.

    Two names over the same memory (a tied head in a state dict) are both published: which
    of them the engine has is the engine's to say. What trainers wrap around a model is taken out
    of the names.

    Args:
        named_tensors: `model.state_dict()` or `model.named_parameters()`. Any strides. Of a
            DTensor this rank's share is described.
        names: what the checkpoint's names are. None: the tensors have them, but for fused
            experts, which are known by their shapes (see `split_fused_experts`).
        only: what is asked for; None for all.

    Raises:
        SourceError: a name twice, a model's with adapters, or a tensor whose memory is not its
            values.
        UnsupportedError: a tensor that is no plain strided memory (sparse, quantized, a DTensor
            of partial sums); a model wrapped by FSDP1.
    """
    given: dict[str, list[SourceBox]] = {}
    pairs = list(_pairs(named_tensors))
    refuse_fsdp1_names([name for name, _ in pairs])
    refuse_adapters([name for name, _ in pairs])
    if only is None:
        refuse_value_heads([name for name, _ in pairs])
    for name, tensor in named_alike(pairs):
        if name in given:
            raise SourceError(
                f"{name}: given twice", remedy="give each HF tensor once, under one name"
            )
        given[name] = _boxes_of(name, tensor)
    boxes = [box for group in given.values() for box in group]
    if names is not None:
        return names.boxes(boxes, only=only)
    named = list(split_fused_experts(boxes))
    return named if only is None else list(only.of(named))


def _boxes_of(name: str, tensor: torch.Tensor) -> list[SourceBox]:
    if is_dtensor(tensor):
        with torch.no_grad():  # then it is the local memory itself
            local = tensor.to_local()
        return shard_boxes(name, tensor, plain_view(name, local))
    view = plain_view(name, tensor)
    if not view.numel():
        raise SourceError(
            f"{name} has no values now, its shape is {tuple(view.shape)}: was it "
            "offloaded or freed?",
            remedy="bring its values back before an update",
        )
    shape = tuple(view.shape)
    return [SourceBox(name=name, global_shape=shape, start=(0,) * len(shape), data=view)]


def plain_view(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's memory as a plain view outside autograd.

    Raises:
        SourceError: not a tensor, or no memory of its own behind each element.
        UnsupportedError: a dtype or tensor class that cannot be moved as bytes.
    """
    if not isinstance(tensor, torch.Tensor):
        raise SourceError(
            f"{name}: a {type(tensor).__name__} is not a tensor", remedy="give torch tensors"
        )
    _refuse_wrapped(name, tensor)
    if tensor.device.type == "meta":
        raise SourceError(
            f"{name}: a meta tensor has no values (was it offloaded?)",
            remedy="materialise the model first; of one offloaded by accelerate remove the hooks",
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
        raise UnsupportedError(
            f"{name}: a {tensor.layout} tensor of {tensor.dtype} cannot be sent",
            remedy="give a dense tensor of a real, unquantized dtype",
        )
    _refuse_shared(name, tensor)
    return tensor.detach().as_subclass(torch.Tensor)


def _refuse_wrapped(name: str, tensor: torch.Tensor) -> None:
    """Refuse classes that keep their values elsewhere than in the tensor's own memory."""
    if torch.nn.parameter.is_lazy(tensor):
        raise SourceError(
            f"{name}: an uninitialized parameter has no values",
            remedy="run one forward pass first",
        )
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise UnsupportedError(
            f"{name}: a {type(tensor).__name__} keeps its values outside its own memory",
            remedy="give plain torch tensors (dequantized, if it is a quantized class)",
        )


def _refuse_shared(name: str, tensor: torch.Tensor) -> None:
    """Refuse memory that does not hold each element's value by itself."""
    if tensor.is_conj() or tensor.is_neg():
        raise SourceError(
            f"{name}: a lazily conjugated or negated view's memory is not its values",
            remedy="give tensor.resolve_conj().resolve_neg(), and keep it alive",
        )
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        raise SourceError(
            f"{name}: its storage has been freed (a parameter that FSDP has resharded since?)",
            remedy="with FSDP2 give the model to WeightSender.from_fsdp; otherwise publish while "
            "the full parameters are in memory",
        )
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    if tensor.numel() and any(stride == 0 and extent > 1 for extent, stride in sizes):
        raise SourceError(
            f"{name}: an expanded tensor (strides {tensor.stride()}) has several elements in "
            "one place",
            remedy="give the tensor before expand(), or a contiguous copy",
        )


def _pairs(named_tensors: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    for pair in cast(Iterable[object], pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise SourceError(
                f"a {type(pair).__name__} is given without a name",
                remedy="give the model itself, or its named_parameters() instead of parameters()",
            )
        name, tensor = pair
        if not isinstance(name, str) or not name:
            raise SourceError(f"a tensor's name is {name!r}", remedy="give (name, tensor) pairs")
        yield name, tensor
