"""Block FP8 quantization as one Triton kernel: a tile is read once and kept in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine_kernels.block_format import BLOCK, BlockFormat, ScaleLayout

__all__ = ["OPTIONS", "constants", "quantize_blocks", "quantize_kernel"]

OPTIONS = {"num_warps": 16, "enable_fp_fusion": False}
"""512 threads, so that the tile of a thread takes few enough registers for two programs on a
multiprocessor. A fused multiply-add would round once where the reference rounds twice."""
GROUP_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
GROUP_ROWS = 32
"""Rows of a tile where each row has scales of its own: 32 elements a thread, as above."""


def quantize_blocks(
    weights: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    block_format: BlockFormat,
) -> None:
    """All experts in one launch: [experts, rows, columns]; buffers were checked."""
    experts, rows, columns = weights.shape
    chosen = constants(block_format, rounds_in_hardware=_rounds_in_hardware(weights.device))
    column_blocks = triton.cdiv(columns, BLOCK)
    if block_format.is_packed:
        column_blocks = triton.cdiv(column_blocks, 4) * 4  # whole words: the rest becomes 0
    grid = (column_blocks, triton.cdiv(rows, chosen["TILE_ROWS"]), experts)
    with torch.cuda.device_of(weights):
        quantize_kernel[grid](
            weights,
            values.view(torch.uint8),
            scales,
            rows,
            columns,
            *weights.stride()[:2],
            values.stride(0),
            *scales.stride(),
            **chosen,
            **options(block_format),
        )


def constants(block_format: BlockFormat, *, rounds_in_hardware: bool) -> dict[str, int]:
    """What is compiled into the kernel."""
    grouped = block_format.block_rows == 1
    return {
        "TILE_ROWS": GROUP_ROWS if grouped else BLOCK,
        "TILE_COLUMNS": BLOCK,
        "GROUPED": grouped,
        "POWERS_OF_TWO": block_format.powers_of_two,
        "PACKED": block_format.layout is ScaleLayout.PACKED_UE8M0,
        "ROUNDS_IN_HARDWARE": rounds_in_hardware,
    }


def options(block_format: BlockFormat) -> dict[str, int]:
    """How the kernel is compiled."""
    return GROUP_OPTIONS if block_format.block_rows == 1 else OPTIONS


def _rounds_in_hardware(device: torch.device) -> bool:
    """Whether the device converts to e4m3 itself: NVIDIA's from compute capability 8.9 on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def quantize_kernel(
    weights,
    values,
    scales,
    rows,
    columns,
    weight_expert_stride,
    weight_row_stride,
    value_expert_stride,
    scale_expert_stride,
    scale_row_stride,
    scale_column_stride,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    GROUPED: tl.constexpr,
    POWERS_OF_TWO: tl.constexpr,
    PACKED: tl.constexpr,
    ROUNDS_IN_HARDWARE: tl.constexpr,
):
    """One tile of one expert: [TILE_ROWS, 128], one scale for it or, GROUPED, for each row."""
    column_block = tl.program_id(0)
    row_tile = tl.program_id(1)
    expert = tl.program_id(2).to(tl.int64)
    first_row = row_tile.to(tl.int64) * TILE_ROWS
    first_column = column_block * TILE_COLUMNS
    row = tl.arange(0, TILE_ROWS)
    column = tl.arange(0, TILE_COLUMNS)
    is_row = row_tile * TILE_ROWS + row < rows
    inside = is_row[:, None] & (first_column + column < columns)[None, :]

    source = weights + expert * weight_expert_stride + first_row * weight_row_stride + first_column
    wide = tl.load(source + row[:, None] * weight_row_stride + column[None, :], inside, other=0.0)
    wide = wide.to(tl.float32)
    size = tl.abs(wide)
    amax = tl.max(tl.where(size < float("inf"), size, 0.0), axis=1)
    if not GROUPED:
        amax = tl.max(amax, axis=0)
    scale = tl.div_rn(tl.maximum(amax, 1e-4), 448.0)
    if POWERS_OF_TWO:
        exponent = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(1.0, scale)
    scaled = wide * (inverse[:, None] if GROUPED else inverse)

    target = values + expert * value_expert_stride + first_row * columns + first_column
    target += row[:, None] * columns + column[None, :]
    tl.store(target, _to_e4m3(scaled, ROUNDS_IN_HARDWARE), inside)

    scale_matrix = scales + expert * scale_expert_stride
    if PACKED:
        word = scale_matrix + (column_block // 4) * scale_column_stride + first_row + row
        byte = word.to(tl.pointer_type(tl.uint8)) + column_block % 4
        exponent = tl.where(first_column < columns, exponent, 0).to(tl.uint8)
        tl.store(byte, exponent if GROUPED else tl.full([TILE_ROWS], exponent, tl.uint8), is_row)
    elif GROUPED:
        place = (first_row + row) * scale_row_stride + column_block * scale_column_stride
        tl.store(scale_matrix + place, scale, is_row)
    else:
        place = row_tile * scale_row_stride + column_block * scale_column_stride
        tl.store(scale_matrix + place, scale)


@triton.jit
def _to_e4m3(wide, ROUNDS_IN_HARDWARE: tl.constexpr):
    """The bytes of float32 values up to 448 in magnitude; 0x7f for what is not finite."""
    if ROUNDS_IN_HARDWARE:
        marked = tl.where(tl.abs(wide) < float("inf"), wide, float("nan"))
        return marked.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return _rounded_by_integers(wide)


@triton.jit
def _rounded_by_integers(wide):
    """The same without the hardware's conversion (older GPUs), or triton's interpreter's wrong one.

    To nearest even at bit 20 of the float32, whose exponents are 120 above e4m3's. Below 2**-6 the
    steps are all 2**-9, which is the last place of floats from 2**14 on: adding 2**14 rounds.
    """
    bits = wide.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (tl.abs(wide) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    rounded = tl.minimum(tl.where(size < 0x3C800000, subnormal, normal), 0x7E)
    rounded = rounded | ((bits >> 24) & 0x80)
    return tl.where(size < 0x7F800000, rounded, 0x7F).to(tl.uint8)
