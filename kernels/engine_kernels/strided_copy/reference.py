"""What a strided copy does, in plain torch."""

from __future__ import annotations

import torch

from engine_kernels.strided_copy.box_table import BoxTable

__all__ = ["copy_boxes"]


def copy_boxes(
    storage: torch.Tensor, packed: torch.Tensor, table: BoxTable, *, gathers: bool
) -> None:
    """Box by box; buffers were checked."""
    for box in table.boxes:
        start = storage.storage_offset() + box.offset
        strided = storage.as_strided((box.rows, box.columns), (box.pitch, 1), start)
        whole = packed[box.packed_offset : box.packed_end].view(box.rows, box.columns)
        if gathers:
            whole.copy_(strided)
        else:
            strided.copy_(whole)
