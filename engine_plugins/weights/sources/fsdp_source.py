"""The tensors of an FSDP2 model, under the names of its HF checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from engine_plugins.errors import UnsupportedError

__all__ = ["fsdp_tensors"]

_WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_orig_mod"})
"""What activation checkpointing and torch.compile put into the path of a parameter."""


def fsdp_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the sharded parameters and the saved buffers, as they are now.

    Modules that are unsharded are resharded first: it is the sharded parameters that the
    optimizer steps. A tied parameter is given once.

    Args:
        model: the module that `fully_shard` was called on; on every rank.

    Raises:
        UnsupportedError: a model wrapped by FSDP1.
    """
    _refuse_fsdp1(model)
    _reshard(model)
    for path, tensor in (*model.named_parameters(), *_saved_buffers(model)):
        yield ".".join(part for part in path.split(".") if part not in _WRAPPERS), tensor


def _refuse_fsdp1(model: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedError(
            "the model is wrapped by FullyShardedDataParallel (FSDP1), whose flat parameters do "
            "not say what lies where",
            remedy="shard it with torch.distributed.fsdp.fully_shard (FSDP2); or gather into "
            "plain tensors that you keep and refill before every update, and use from_hf",
        )


def _reshard(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that a checkpoint holds (a router's bias, say), and not what is computed anew."""
    for prefix, module in model.named_modules():
        for path, buffer in module.named_buffers(prefix, recurse=False):
            if path.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield path, buffer
