"""What an engine's own checkpoint holds, and which parameters it leaves as they were built.

Some models have parameters that no checkpoint of theirs fills: an engine shares a class between
families, one of which has no norm there. A trainer cannot send what its model does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.loader_trace import LoaderTrace

__all__ = ["left_as_built", "tensors_of_checkpoint"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the names in the headers of safetensors files; tensors of others are passed over."""


def tensors_of_checkpoint(model: str, revision: str | None = None) -> list[LogicalTensor]:
    """The tensors of a checkpoint in safetensors files, from their headers.

    Args:
        model: a folder, or a name on the hub whose files are in the cache; nothing is downloaded.
        revision: of the hub's.

    Returns:
        Nothing where there are no such files.
    """
    from safetensors import safe_open  # an engine has both, a trainer need not

    found = []
    for file in sorted(_folder(model, revision).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                kept = opened.get_slice(name)
                dtype = _DTYPES.get(kept.get_dtype())
                if dtype is not None:
                    shape = tuple(kept.get_shape())
                    found.append(LogicalTensor(name=name, shape=shape, dtype=dtype))
    return found


def _folder(model: str, revision: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # it is not in the cache, or no name of the hub
        return Path(model)


def left_as_built(
    trace: LoaderTrace,
    own: Callable[[], Sequence[LogicalTensor]],
    trace_again: Callable[[Sequence[LogicalTensor]], LoaderTrace],
) -> LoaderTrace:
    """The trace, with nothing to load for parameters that the engine's own checkpoint leaves too.

    An output head is not among them: without values it is one that the trainer has tied.

    Args:
        trace: of what a trainer offers.
        own: gives the tensors of the engine's own checkpoint; called only if it has to be.
        trace_again: what the loader does with them.
    """
    left = _untouched(trace)
    if not left or not (tensors := own()):
        return trace
    by_design = left & _untouched(trace_again(tensors))
    numel = {name: 0 if name in by_design else n for name, n in trace.parameter_numel.items()}
    return replace(trace, parameter_numel=numel)


def _untouched(trace: LoaderTrace) -> set[str]:
    return {
        name
        for name, filling in trace.filling().items()
        if trace.parameter_numel[name]
        and not filling.copied
        and not name.endswith("lm_head.weight")
    }
