"""A strided copy as one Triton kernel: a program for each tile of the table."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine_kernels.strided_copy.box_table import BoxTable

__all__ = ["OPTIONS", "constants", "copy_boxes", "copy_kernel"]

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def copy_boxes(
    storage: torch.Tensor, packed: torch.Tensor, table: BoxTable, *, gathers: bool
) -> None:
    """All boxes in one launch; buffers were checked."""
    word = WORDS[table.word_bytes]
    with torch.cuda.device_of(storage):
        copy_kernel[(len(table.tiles),)](
            _as_words(storage, word),
            _as_words(packed, word),
            table.tiles,
            **constants(table, gathers=gathers),
            **OPTIONS,
        )


def constants(table: BoxTable, *, gathers: bool) -> dict[str, int]:
    """What is compiled into the kernel."""
    return {
        "TILE_ROWS": table.tile_rows,
        "TILE_COLUMNS": table.tile_columns,
        "MULTIPLE": table.unit_bytes // table.word_bytes,
        "GATHERS": gathers,
    }


def _as_words(buffer: torch.Tensor, word: torch.dtype) -> torch.Tensor:
    """The same memory; what is left of it after the last whole word belongs to no box."""
    whole = buffer.numel() * buffer.element_size() // word.itemsize * word.itemsize
    return buffer.view(torch.uint8)[:whole].view(word)


@triton.jit
def copy_kernel(
    strided,
    packed,
    tiles,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    MULTIPLE: tl.constexpr,
    GATHERS: tl.constexpr,
):
    """One tile: [rows, columns] words `pitch` apart on one side and `packed_pitch` on the other.

    What the table holds is a multiple of MULTIPLE words, so two of 8 bytes move as one access.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 6
    strided += tl.multiple_of(tl.load(tile), MULTIPLE)
    packed += tl.multiple_of(tl.load(tile + 1), MULTIPLE)
    rows = tl.load(tile + 2).to(tl.int32)
    columns = tl.multiple_of(tl.load(tile + 3).to(tl.int32), MULTIPLE)
    pitch = tl.multiple_of(tl.load(tile + 4), MULTIPLE)
    packed_pitch = tl.multiple_of(tl.load(tile + 5), MULTIPLE)
    row = tl.arange(0, TILE_ROWS)[:, None]
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    apart = strided + row * pitch + column
    together = packed + row * packed_pitch + column
    if GATHERS:
        tl.store(together, tl.load(apart, inside), inside)
    else:
        tl.store(apart, tl.load(together, inside), inside)
