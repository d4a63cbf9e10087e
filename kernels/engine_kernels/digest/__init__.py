"""A digest of a tensor that is the sum of its boxes' digests, however it is cut.

Let x be the bits of the element at (row, column), as an unsigned number; the row counts all axes
but the last, in row-major order of the whole logical tensor. The digest is, modulo 2**64,

    sum of (x + 1) * R(row) * C(column)

with R and C odd numbers of 64 bits from splitmix64 (`reference.py::row_keys`, `column_keys`). Sums
of disjoint boxes add up to the digest of their union; nothing else of the cut enters. It is no
defence against someone who looks for a collision: the keys are known.

What goes unseen: a change of one element never, since its factor is odd, nor a missing element of 4
bytes or fewer, since x + 1 is not 0. Any other change, with keys taken as random, by a chance of at
most (64 - v) / 2**(62 - v), where all changes are multiples of 2**v: 2**-56 where the lowest bit of
any element differs, and at the worst (only the highest bits do) 2**-49 for elements of one byte,
2**-41 of two, 2**-26 of four (of eight none: two sign bits cancel each other). Splitmix64 for each
element would give 2**-64 at over 25 instructions in place of 7, and memory is faster than that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine_kernels.buffers import (
    BufferMismatchError,
    require_device,
    require_dtype,
    require_shape,
)
from engine_kernels.dispatch import implementation

__all__ = ["add_digest"]

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def add_digest(
    box: torch.Tensor,
    into: torch.Tensor,
    *,
    shape: Sequence[int] | None = None,
    start: Sequence[int] | None = None,
) -> None:
    """Add the digest of a box of a logical tensor to `into`, modulo 2**64.

    Args:
        box: what this process holds of it, any strides, elements of 1, 2, 4 or 8 bytes.
        into: int64 [1], the sum so far; the same number unsigned is `int(into) % 2**64`.
        shape: of the whole logical tensor; the box's own if left out.
        start: where in it the box begins, for each axis; 0 if left out.

    Raises:
        BufferMismatchError: the box does not lie in the shape, or a tensor is not of this kind;
            `into` is as before.
    """
    shape = tuple(box.shape if shape is None else shape)
    start = tuple(start or (0,) * len(shape))
    _check(box, into, shape, start)
    if box.numel() == 0:
        return
    if box.dim() == 0:
        box, shape, start = box.reshape(1), (1,), (0,)
    words = box.view(WORDS[box.element_size()])
    implementation(__name__, box.device).add_digest(words, into, shape, start)


def _check(
    box: torch.Tensor, into: torch.Tensor, shape: tuple[int, ...], start: tuple[int, ...]
) -> None:
    require_dtype(into, "into", (torch.int64,))
    require_shape(into, "into", (1,), "one tensor has one digest")
    require_device(into, "into", box.device)
    if box.element_size() not in WORDS:
        raise BufferMismatchError(
            f"elements of the box have {box.element_size()} bytes",
            follows="there is no unsigned number of that size to take them as",
            remedy="Give a view as numbers of 8 bytes or fewer",
        )
    if not len(shape) == len(start) == box.dim() or any(
        low < 0 or low + size > whole
        for low, size, whole in zip(start, box.shape, shape, strict=True)
    ):
        raise BufferMismatchError(
            f"a box of {list(box.shape)} at {list(start)} does not lie in {list(shape)}",
            follows="its elements have no place of which a digest could speak",
            remedy="Give the whole tensor's shape, and the box's start for each of its axes",
        )
