"""Every tensor that a model holds, wherever it keeps it, and in what two models differ."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from tests.support.loader_maps import same_bits

__all__ = ["differences", "tensors_of"]

_DEPTH = 6
_ADDRESSES = frozenset({"handler_tensor"})
"""Tensors that hold no values but an address: of vLLM's oneDNN kernels."""
_OF_MODULES = frozenset(vars(nn.Module()))
"""What every module has: its tensors and submodules are walked, its hooks hold none."""


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and tensors among the plain attributes of every module, by path.

    Attributes are looked through: lists, dicts, the engine's own objects (a layer's method of
    quantisation, its kernel), functions and what they close over.
    """
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers}
        held = {key: value for key, value in vars(module).items() if key not in _OF_MODULES}
        seen: set[int] = set()
        for path, tensor in _held({**own, **held}, name, seen, _DEPTH):
            found[path] = tensor.detach()
    return found


def _held(value: Any, path: str, seen: set[int], depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if depth == 0 or id(value) in seen:
        return
    seen.add(id(value))
    for key, part in _parts(value):
        if key in _ADDRESSES:
            continue
        yield from _held(part, f"{path}.{key}", seen, depth - 1)


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """What an attribute's value holds, as far as it can hold weights."""
    if isinstance(value, Mapping):
        yield from list(value.items())
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, functools.partial):
        yield from enumerate([value.func, *value.args, *value.keywords.values()])
    elif isinstance(value, MethodType):
        yield "self", value.__self__
    elif isinstance(value, FunctionType):
        for key, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield key, cell.cell_contents
            except ValueError:  # a cell that has no value yet
                continue
    elif _may_hold_weights(value):
        yield from list(vars(value).items())


def _may_hold_weights(value: Any) -> bool:
    """Objects of the engine that are no module (those are walked on their own) and no setting."""
    kind = type(value)
    of_engine = kind.__module__.partition(".")[0] in {"vllm", "sglang"}
    setting = "config" in kind.__module__ or kind.__name__.endswith(("Config", "Args"))
    return (
        of_engine
        and hasattr(value, "__dict__")
        and not isinstance(value, nn.Module | type)
        and not setting
    )


def differences(live: Mapping[str, torch.Tensor], fresh: Mapping[str, torch.Tensor]) -> list[str]:
    """Paths of tensors that a model lacks, or holds otherwise, to the bit."""
    return [path for path, tensor in fresh.items() if not _same(live.get(path), tensor)]


def _same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    if one is None or one.device != other.device:
        return False
    return other.device.type == "meta" or same_bits(one, other)
