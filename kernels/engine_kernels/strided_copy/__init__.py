"""Boxes of strided memory into one contiguous buffer and back, all boxes in one launch.

A row-parallel slice is one box; the query, key and value rows that Megatron interleaves by group,
or the gate and up halves of one parameter, are a few boxes each. What goes where is prepared once,
as a `BoxTable`.
"""

from __future__ import annotations

import torch

from engine_kernels.dispatch import implementation
from engine_kernels.strided_copy.box_table import BoxTable

__all__ = ["gather_strided", "scatter_strided"]


@torch.no_grad()
def gather_strided(storage: torch.Tensor, packed: torch.Tensor, table: BoxTable) -> None:
    """Copy each box of `storage` to its place in `packed`; the rest of `packed` is left alone.

    Args:
        storage: [elements], contiguous, of the table's dtype and on its device.
        packed: likewise.
        table: what goes where.

    Raises:
        BufferMismatchError: a tensor is not of this kind, or too short; nothing was written.
    """
    _copy(storage, packed, table, gathers=True)


@torch.no_grad()
def scatter_strided(packed: torch.Tensor, storage: torch.Tensor, table: BoxTable) -> None:
    """The inverse of `gather_strided`: what lies between the boxes of `storage` is left alone.

    Of boxes that overlap in `storage` it is not said which one stays.

    Raises:
        BufferMismatchError: as `gather_strided`.
    """
    _copy(storage, packed, table, gathers=False)


def _copy(storage: torch.Tensor, packed: torch.Tensor, table: BoxTable, *, gathers: bool) -> None:
    table.check(storage, packed)
    if not table.boxes:
        return
    implementation(__name__, storage.device).copy_boxes(storage, packed, table, gathers=gathers)
