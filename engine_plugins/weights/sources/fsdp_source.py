"""The tensors of an FSDP2 model, under the names of its HF checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from engine_plugins.errors import UnsupportedError
from engine_plugins.weights.sources.wrapper_names import plain_name, unwrapped

__all__ = ["fsdp_tensors", "refuse_fsdp1_names", "reshard"]

_FSDP1_PARTS = ("_fsdp_wrapped_module", "_flat_param")


def fsdp_tensors(
    model: nn.Module, *, each_place: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the parameters, of FSDP2 the sharded ones, and the saved buffers, as they are now.

    Modules that are unsharded are resharded first: it is the sharded parameters that the
    optimizer steps. A tied parameter is given once.

    Args:
        model: any module; where `fully_shard` was called on it, on every rank.
        each_place: give a tied parameter under the name of each module that has it.

    Raises:
        UnsupportedError: a model wrapped by FSDP1.
    """
    _refuse_fsdp1(model)
    reshard(model)
    inner = unwrapped(model)
    parameters = _in_each_place(inner) if each_place else inner.named_parameters()
    for path, tensor in (*parameters, *_saved_buffers(inner)):
        yield plain_name(path), tensor


def _refuse_fsdp1(model: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise _fsdp1()


def refuse_fsdp1_names(names: Iterable[str]) -> None:
    """Refuse tensors whose names say that they are shares of FSDP1's.

    Raises:
        UnsupportedError: a name has a part that FSDP1 has put into it.
    """
    if any(part in _FSDP1_PARTS for name in names for part in name.split(".")):
        raise _fsdp1()


def _fsdp1() -> UnsupportedError:
    return UnsupportedError(
        "the model is wrapped by FullyShardedDataParallel (FSDP1), whose flat parameters do not "
        "say what lies where",
        remedy="shard it with torch.distributed.fsdp.fully_shard (FSDP2); or gather into plain "
        "tensors that you keep and refill before every update, and give those to from_hf",
    )


def reshard(model: nn.Module) -> None:
    """Have every part that lies unsharded be sharded again, as the optimizer steps it."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _in_each_place(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        yield from module.named_parameters(prefix, recurse=False)


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that a checkpoint holds (a router's bias, say), and not what is computed anew."""
    for prefix, module in model.named_modules():
        for path, buffer in module.named_buffers(prefix, recurse=False):
            if path.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield path, buffer
