"""Whether tensors come in the dtypes of the parameters that they fill, and in which they should."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.loader_trace import LoaderTrace, TracedCopy

__all__ = ["dtype_problems", "wanted_dtypes"]


def dtype_problems(
    trace: LoaderTrace, model_dtype: torch.dtype, *, mended: Collection[str] = ()
) -> list[str]:
    """Say which copies would change values.

    A cast is right only where the engine would cast its own checkpoint as well.

    Args:
        trace: what the loader does.
        model_dtype: the dtype that the engine serves in.
        mended: tensors that their sender will cast; copies of these are passed over.
    """
    return [
        f"{'+'.join(copy.sources)} is {_say(copy.source_dtype)}, "
        f"{copy.parameter} wants {_say(copy.parameter_dtype)}"
        for copy in _misfits(trace, model_dtype)
        if not any(name in mended for name in copy.sources)
    ]


def wanted_dtypes(
    trace: LoaderTrace, tensors: Sequence[LogicalTensor], model_dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """The dtype of the parameter that each tensor fills, for tensors that come in a wrong one.

    Of a tensor that fills parameters of several dtypes it is the engine's own, which its loader
    casts. Tensors that no cast would make right are left out: bytes and whole numbers, and what
    already comes in the dtype that it should have.

    Args:
        trace: what the loader does with these tensors.
        tensors: as they are offered.
        model_dtype: the dtype that the engine serves in.
    """
    offered = {tensor.name: tensor.dtype for tensor in tensors}
    misfits = [
        copy
        for copy in _misfits(trace, model_dtype)
        if _is_wide(copy.source_dtype) and _is_wide(copy.parameter_dtype)
    ]
    names = dict.fromkeys(name for copy in misfits for name in copy.sources)
    filled: dict[str, set[torch.dtype]] = {name: set() for name in names}
    for copy in _filling_copies(trace):
        for name in copy.sources:
            if name in filled:
                filled[name].add(copy.parameter_dtype)
    wanted = {
        name: next(iter(dtypes)) if len(dtypes) == 1 else model_dtype
        for name, dtypes in filled.items()
    }
    return {
        name: dtype
        for name, dtype in wanted.items()
        if _is_wide(offered[name]) and offered[name] != dtype
    }


def _misfits(trace: LoaderTrace, model_dtype: torch.dtype) -> list[TracedCopy]:
    """Copies that cast where the engine would not cast its own checkpoint."""
    return [copy for copy in _filling_copies(trace) if not _is_right(copy, model_dtype)]


def _filling_copies(trace: LoaderTrace) -> list[TracedCopy]:
    """All but copies into what an engine derives from its parameters, in a dtype of its choice."""
    known: Mapping[str, int] = trace.parameter_numel
    return [copy for copy in trace.copies if copy.parameter in known]


def _is_right(copy: TracedCopy, model_dtype: torch.dtype) -> bool:
    """To or from bytes a cast never is: such values mean nothing without their scales."""
    bytewise = 1 in (copy.source_dtype.itemsize, copy.parameter_dtype.itemsize)
    return copy.source_dtype == copy.parameter_dtype or (
        copy.source_dtype == model_dtype and not bytewise
    )


def _is_wide(dtype: torch.dtype) -> bool:
    """A floating dtype whose values stand for themselves."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _say(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
