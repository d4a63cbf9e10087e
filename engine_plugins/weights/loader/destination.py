"""The destination map: where in its parameters the engine's loader puts each box of a tensor.

It is read from the trace of the loader. What is not a pure copy of a box (a cast, arithmetic,
every other row) has no place in it, and one such copy keeps its whole module out: a fused
parameter is filled by one way only.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.loader_trace import LoaderTrace, TracedCopy

__all__ = ["DestinationBox", "DestinationMap", "destination_map"]

Numbers = tuple[int, ...]


class DestinationBox(NamedTuple):
    """A box of one HF tensor and the elements of one parameter that it fills."""

    tensor: str
    start: Numbers
    """First index on every axis of the HF tensor."""
    shape: Numbers
    parameter: str
    offset: int
    """Elements from the start of the parameter's storage to the box's first element."""
    strides: Numbers
    """Elements of the parameter's storage between neighbours on every axis of the HF tensor."""


@dataclass(frozen=True, kw_only=True)
class DestinationMap:
    """Every module of one engine rank that its loader fills by copying boxes.

    Attributes:
        boxes: by module, in the loader's order.
        reasons: by module, why the others have to go through the loader.
    """

    boxes: Mapping[str, Sequence[DestinationBox]]
    reasons: Mapping[str, str]


def destination_map(trace: LoaderTrace, tensors: Sequence[LogicalTensor]) -> DestinationMap:
    """Turn the copies of a trace into boxes and places."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    boxes: dict[str, dict[DestinationBox, None]] = {}
    reasons: dict[str, str] = {}
    for copy in trace.copies:
        if not copy.sources or (copy.pure and not prod(copy.shape)):
            continue  # a constant is in place since the engine started
        module = copy.parameter.rpartition(".")[0]
        placed = _placed(copy, shapes)
        if isinstance(placed, str):
            reasons.setdefault(module, placed)
        else:
            boxes.setdefault(module, {})[placed] = None
    return DestinationMap(
        boxes={module: tuple(each) for module, each in boxes.items() if module not in reasons},
        reasons=reasons,
    )


def _placed(copy: TracedCopy, shapes: Mapping[str, Numbers]) -> DestinationBox | str:
    """The copy as a box and its place, or why it is none."""
    names = "+".join(copy.sources)
    if copy.source_dtype != copy.parameter_dtype:
        return f"{names} is cast from {copy.source_dtype} to {copy.parameter_dtype}"
    if copy.read is None or not copy.pure:
        return f"the loader computes {copy.parameter} from {names}"
    box = _box_of(shapes[names], *copy.read, copy.strides)
    if box is None:
        return f"the loader reads {names} in steps that are no box"
    start, shape, strides = box
    return DestinationBox(names, start, shape, copy.parameter, copy.offset, strides)


@functools.lru_cache(maxsize=4096)
def _box_of(
    whole: Numbers, offset: int, shape: Numbers, steps: Numbers, target: Numbers
) -> tuple[Numbers, Numbers, Numbers] | None:
    """A view of a contiguous tensor as a box of it: start, shape, and the target's strides.

    The view has an offset, a shape and steps; `target` are the strides of what it is copied to. An
    axis of the view that runs through several whole axes of the tensor is taken apart. None where
    the view is no box.
    """
    start: list[int] = []
    left = offset
    for axis in range(len(whole)):
        index, left = divmod(left, prod(whole[axis + 1 :]))
        start.append(index)
    extent, strides = [1] * len(whole), [0] * len(whole)
    for size, step, stride in zip(shape, steps, target, strict=True):
        rest, apart = size, stride
        axis = next((a for a in range(len(whole)) if prod(whole[a + 1 :]) == step), -1)
        while rest > 1:
            if axis < 0 or extent[axis] != 1:
                return None
            extent[axis], strides[axis] = min(rest, whole[axis]), apart
            runs_on = rest > whole[axis] - start[axis]
            if runs_on and (start[axis] or rest % whole[axis]):
                return None
            rest = rest // whole[axis] if runs_on else 1
            apart *= whole[axis]
            axis -= 1
    return tuple(start), tuple(extent), tuple(strides)
