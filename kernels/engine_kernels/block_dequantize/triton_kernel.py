"""Block FP8 dequantization as one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine_kernels.block_format import BLOCK, BlockFormat

__all__ = ["OPTIONS", "constants", "dequantize_blocks", "dequantize_kernel"]

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
TILE_ROWS = 32
"""32 elements a thread; a tile lies within one block, whose scale it then reads once."""


def dequantize_blocks(
    values: torch.Tensor,
    scales: torch.Tensor,
    weights: torch.Tensor,
    block_format: BlockFormat,
) -> None:
    """All experts in one launch: [experts, rows, columns]; buffers were checked."""
    experts, rows, columns = weights.shape
    grid = (triton.cdiv(columns, BLOCK), triton.cdiv(rows, TILE_ROWS), experts)
    with torch.cuda.device_of(weights):
        dequantize_kernel[grid](
            values.view(torch.uint8),
            scales,
            weights,
            rows,
            columns,
            values.stride(0),
            *scales.stride(),
            *weights.stride()[:2],
            **constants(block_format),
            **OPTIONS,
        )


def constants(block_format: BlockFormat) -> dict[str, int]:
    """What is compiled into the kernel."""
    return {
        "TILE_ROWS": TILE_ROWS,
        "TILE_COLUMNS": BLOCK,
        "BLOCK_ROWS": block_format.block_rows,
        "PACKED": block_format.is_packed,
    }


@triton.jit
def dequantize_kernel(
    values,
    scales,
    weights,
    rows,
    columns,
    value_expert_stride,
    scale_expert_stride,
    scale_row_stride,
    scale_column_stride,
    weight_expert_stride,
    weight_row_stride,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """One tile of one expert, [TILE_ROWS, 128], within one column of blocks."""
    column_block = tl.program_id(0)
    row_tile = tl.program_id(1)
    expert = tl.program_id(2).to(tl.int64)
    first_row = row_tile.to(tl.int64) * TILE_ROWS
    first_column = column_block * TILE_COLUMNS
    row = tl.arange(0, TILE_ROWS)
    column = tl.arange(0, TILE_COLUMNS)
    is_row = row_tile * TILE_ROWS + row < rows
    inside = is_row[:, None] & (first_column + column < columns)[None, :]

    source = values + expert * value_expert_stride + first_row * columns + first_column
    byte = tl.load(source + row[:, None] * columns + column[None, :], inside, other=0)
    narrow = _from_e4m3(byte)
    scale_matrix = scales + expert * scale_expert_stride
    if PACKED:
        word = scale_matrix + (column_block // 4) * scale_column_stride + first_row + row
        exponent = (tl.load(word, is_row, other=0) >> (column_block % 4 * 8)) & 0xFF
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    elif BLOCK_ROWS == 1:
        place = (first_row + row) * scale_row_stride + column_block * scale_column_stride
        scale = tl.load(scale_matrix + place, is_row, other=0.0)
    else:
        block = row_tile * TILE_ROWS // BLOCK_ROWS
        place = block * scale_row_stride + column_block * scale_column_stride
        scale = tl.full([TILE_ROWS], tl.load(scale_matrix + place), tl.float32)
    wide = narrow * scale[:, None]

    target = weights + expert * weight_expert_stride + first_row * weight_row_stride + first_column
    target += row[:, None] * weight_row_stride + column[None, :]
    if weights.dtype.element_ty == tl.bfloat16:
        tl.store(target.to(tl.pointer_type(tl.int16)), _to_bf16(wide), inside)
    else:
        tl.store(target, wide, inside)


@triton.jit
def _from_e4m3(byte):
    """float32 of e4m3 bytes: the fields moved, as 2**-120 of it, and scaled back exactly.

    As with all GPU arithmetic here subnormals are kept, which the smallest of these are.
    """
    bits = byte.to(tl.int32)
    size = bits & 0x7F
    wide = (size << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    wide = tl.where(size == 0x7F, float("nan"), wide)
    return tl.where(bits < 0x80, wide, -wide)


@triton.jit
def _to_bf16(wide):
    """The bits of float32 rounded to nearest even; triton's interpreter would cut them off."""
    bits = wide.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
