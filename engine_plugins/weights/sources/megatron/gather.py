"""Parameters of which a Megatron rank holds only its own slice after the optimizer's step.

With the distributed optimizer and `overlap_param_gather` a step leaves each data-parallel rank
with the new values of one slice; hooks of the next forward pass gather the rest. Whoever reads
the parameters before that reads a mixture of two steps. Source: megatron-core 0.16.1 and its main
branch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import nn

from engine_plugins.errors import SourceError, UnsupportedError

__all__ = ["check_gathering", "parameter_gathers"]

_SHARDED = {"MegatronFSDP", "FullyShardedDataParallel", "TorchFullyShardedDataParallel"}
"""Wrappers whose parameters are no Megatron shards."""


def check_gathering(chunk: nn.Module) -> None:
    """Refuse a chunk whose parameters cannot be brought up to date where they lie.

    Raises:
        UnsupportedError: a wrapper that shards or keeps parameters in a way of its own.
    """
    for module in chunk.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__} & _SHARDED
        if kinds:
            raise _refused(f"the chunk is wrapped by {kinds.pop()}", "train without FSDP")
    for wrapper in _wrappers(chunk):
        config = wrapper.ddp_config
        for option in ("use_megatron_fsdp", "use_custom_fsdp"):
            if getattr(config, option, False):
                raise _refused(f"ddp_config has {option}", "train without FSDP")
        if getattr(config, "reuse_grad_buf_for_mxfp8_param_ag", False):
            raise _refused(
                "ddp_config has reuse_grad_buf_for_mxfp8_param_ag: new parameters are gathered "
                "into the gradients' buffer, and get to their place in the next forward pass only",
                "train without it",
            )
        if _gathers_later(wrapper) and not callable(getattr(wrapper, "start_param_sync", None)):
            raise _refused(
                f"ddp_config has overlap_param_gather, and a {type(wrapper).__name__} has no "
                "start_param_sync to force the gather with",
                "train without overlap_param_gather",
            )


def parameter_gathers(
    chunks: Iterable[nn.Module], members: Collection[int]
) -> list[Callable[[], None]]:
    """What to call, in this order, so that the chunks' parameters are those of the last step.

    Each call is a collective of the ranks that hold the same parameters. Those have the same
    chunks in the same order, so no two of them can wait for each other. Values that were gathered
    before are gathered again, which changes nothing; a gather under way is waited for.

    Args:
        chunks: this rank's model chunks, in order.
        members: global ranks of the trainer processes that will make these calls.

    Raises:
        SourceError: ranks that the gather needs and that are not among them, or parameters that
            are offloaded.
    """
    wrappers = [
        wrapper for chunk in chunks for wrapper in _wrappers(chunk) if _gathers_later(wrapper)
    ]
    for wrapper in wrappers:
        _check_members(wrapper, members)
        _check_memory(wrapper)
    return [partial(wrapper.start_param_sync, force_sync=True) for wrapper in wrappers]


def _wrappers(chunk: nn.Module) -> Iterator[Any]:
    """Every DDP wrapper of the chunk: in it, or around it and known by the hooks it left inside."""
    seen: set[int] = set()
    for module in chunk.modules():
        owners = (_owner(hook) for hook in module._forward_pre_hooks.values())
        for found in (module, *owners):
            if hasattr(found, "ddp_config") and id(found) not in seen:
                seen.add(id(found))
                yield found


def _owner(hook: Any) -> object:
    """The wrapper whose method made a hook, so that an unwrapped model is no way round."""
    cells = getattr(hook, "__closure__", None) or ()
    names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
    owner = dict(zip(names, cells, strict=False)).get("self")
    return getattr(hook, "__self__", None) if owner is None else owner.cell_contents


def _gathers_later(wrapper: Any) -> bool:
    # In 0.16.1 the option does nothing without the distributed optimizer, and no hook is used.
    wanted = getattr(wrapper.ddp_config, "overlap_param_gather", False)
    return bool(wanted and getattr(wrapper, "use_forward_hook", True))


def _check_members(wrapper: Any, members: Collection[int]) -> None:
    """A rank that gathers alone waits for ever."""
    for name in ("bucket_groups", "expert_parallel_bucket_groups"):
        for bucket_group in getattr(wrapper, name, ()):
            group = getattr(bucket_group, "intra_distributed_optimizer_instance_group", None)
            if group is None:
                continue
            missing = set(dist.get_process_group_ranks(group)) - set(members)
            if missing:
                raise SourceError(
                    f"with overlap_param_gather the ranks {sorted(missing)} hold new values of "
                    "this rank's parameters, and take no part in the update",
                    remedy="call the sender on every rank of the data-parallel group",
                )


def _check_memory(wrapper: nn.Module) -> None:
    """The gather would write to memory that is gone."""
    for name, parameter in wrapper.named_parameters():
        if parameter.numel() and parameter.untyped_storage().nbytes() == 0:
            raise SourceError(
                f"{name}: its memory is offloaded",
                remedy="bring the parameters back before the update",
            )


def _refused(what: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what}; such parameters cannot be read where they lie",
        remedy=f"{remedy}; or publish HF-named tensors with WeightSender.from_hf",
    )
