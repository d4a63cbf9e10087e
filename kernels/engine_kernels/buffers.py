"""What must hold of a caller's buffer before a kernel writes into it or reads it.

Kernels take what they are given: nothing is copied to make it fit, and nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = [
    "BufferMismatchError",
    "require_address",
    "require_aligned_matrices",
    "require_device",
    "require_dtype",
    "require_matrices",
    "require_rows",
    "require_shape",
]


class BufferMismatchError(ValueError):
    """A buffer is not what the operation needs; nothing was read or written."""

    def __init__(self, seen: str, *, follows: str, remedy: str) -> None:
        super().__init__(f"{seen}: {follows}. {remedy}")


def require_device(tensor: torch.Tensor, name: str, device: torch.device) -> None:
    """All tensors of a call lie on one device."""
    if tensor.device != device:
        raise BufferMismatchError(
            f"{name} is on {tensor.device}, the other tensors on {device}",
            follows="one kernel cannot reach both",
            remedy=f"Give {name} on {device}",
        )


def require_dtype(tensor: torch.Tensor, name: str, dtypes: Sequence[torch.dtype]) -> None:
    """The dtype is one of these."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(_short(dtype) for dtype in dtypes)
        raise BufferMismatchError(
            f"{name} is {_short(tensor.dtype)}, not {wanted}",
            follows="its bytes would mean something else",
            remedy=f"Give {name} as {wanted}; nothing is converted here",
        )


def require_shape(tensor: torch.Tensor, name: str, shape: Sequence[int], why: str) -> None:
    """The shape is this one, for the reason that is named."""
    if tuple(tensor.shape) != tuple(shape):
        raise BufferMismatchError(
            f"{name} has shape {list(tensor.shape)}, not {list(shape)}",
            follows=why,
            remedy=f"Allocate {name} with shape {list(shape)} once, and give it every time",
        )


def require_rows(tensor: torch.Tensor, name: str) -> None:
    """Elements of a row lie next to each other; rows and matrices may be apart."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise BufferMismatchError(
            f"elements of a row of {name} are {tensor.stride(-1)} apart",
            follows="rows would be read element by element",
            remedy=f"Give {name} with its last axis contiguous",
        )


def require_matrices(
    tensor: torch.Tensor, name: str, strides: tuple[int, int], extent: int
) -> None:
    """Each [rows, columns] has these strides; matrices lie `extent` elements apart or more.

    A stride along an axis of one element says nothing and is not looked at.
    """
    seen = tensor.stride()
    for axis, wanted in zip((-2, -1), strides, strict=True):
        if tensor.shape[axis] > 1 and seen[axis] != wanted:
            raise BufferMismatchError(
                f"{name} has strides {list(seen)}, not [..., {strides[0]}, {strides[1]}]",
                follows="it is not laid out as its format says, and no copy is made of it",
                remedy=f"Give a view of {name} with these strides, or another format",
            )
    if tensor.dim() == 3 and tensor.shape[0] > 1 and seen[0] < extent:
        raise BufferMismatchError(
            f"matrices of {name} are {seen[0]} elements apart and hold {extent}",
            follows="they would overwrite each other",
            remedy=f"Give {name} with at least {extent} elements from matrix to matrix",
        )


def require_address(tensor: torch.Tensor, name: str, alignment_bytes: int) -> None:
    """The address is a multiple of this."""
    if over := tensor.data_ptr() % alignment_bytes:
        raise BufferMismatchError(
            f"{name} begins {over} bytes past a multiple of {alignment_bytes}",
            follows="it is read and written in units of that size",
            remedy=f"Begin {name} at a multiple of {alignment_bytes} bytes",
        )


def require_aligned_matrices(tensor: torch.Tensor, name: str, alignment_bytes: int) -> None:
    """The address of each matrix is a multiple of this."""
    require_address(tensor, name, alignment_bytes)
    if tensor.dim() < 3 or tensor.shape[0] < 2:
        return
    step_bytes = tensor.stride(0) * tensor.element_size()
    if step_bytes % alignment_bytes:
        raise BufferMismatchError(
            f"matrices of {name} are {step_bytes} bytes apart",
            follows=f"all but the first would lie off multiples of {alignment_bytes}",
            remedy=f"Give {name} with a multiple of {alignment_bytes} bytes between them",
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
