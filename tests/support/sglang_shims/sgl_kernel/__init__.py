"""Test only: what SGLang imports of its kernel package on a CPU, written in torch.

The real package is built for GPUs, and for CPUs from source. On a CPU SGLang imports a few names
of it without condition; nothing that the tests run calls one that is not written out here.
Everything else in these tests is the real SGLang. Users install SGLang, and its kernels, as its
own manual says.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NoReturn

import torch

__all__ = ["copy_all_layer_kv_cache_cpu"]


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy rows `src_loc` over rows `tgt_loc` in the KV buffers of all layers, in place.

    Args:
        data_ptrs: [buffers] uint64, the addresses of the key and value buffers.
        strides: [buffers] int64, bytes of a row of each.
        tgt_loc: [rows] integers, where to.
        src_loc: [rows] integers, where from.
    """
    if not len(src_loc):
        return
    rows = int(max(tgt_loc.max(), src_loc.max())) + 1
    for address, row_bytes in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (rows * row_bytes)).from_address(address)
        buffer = torch.frombuffer(memory, dtype=torch.uint8).view(rows, row_bytes)
        buffer[tgt_loc.long()] = buffer[src_loc.long()]


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """A stand-in of any other kernel: SGLang may import it, and nobody may call it."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*arguments: object, **options: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} is a compiled kernel of SGLang; engine-plugins' tests run with a "
            f"stand-in that has {', '.join(__all__)} and nothing else"
        )

    return missing
