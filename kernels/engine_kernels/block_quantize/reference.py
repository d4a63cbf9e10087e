"""What block FP8 quantization computes, in plain torch."""

from __future__ import annotations

import torch

from engine_kernels.block_format import BLOCK, E4M3_MAX, SMALLEST_AMAX, BlockFormat, ScaleLayout

__all__ = ["pack_exponents", "quantize_blocks"]

NAN_BYTE = 0x7F


def quantize_blocks(
    weights: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    block_format: BlockFormat,
) -> None:
    """Expert by expert: [experts, rows, columns]; buffers were checked."""
    for matrix, value, scale in zip(weights, values, scales, strict=True):
        of_blocks = block_scales(matrix, block_format)
        value.copy_(_rounded(matrix, of_blocks, block_format))
        if block_format.layout is ScaleLayout.PACKED_UE8M0:
            rows_of_blocks = of_blocks.repeat_interleave(block_format.block_rows, dim=0)
            scale.copy_(pack_exponents(rows_of_blocks[: len(matrix)]))
        else:
            scale.copy_(of_blocks)


def block_scales(matrix: torch.Tensor, block_format: BlockFormat) -> torch.Tensor:
    """float32 [row blocks, column blocks] of a matrix [rows, columns]."""
    sizes = matrix.float().abs()
    sizes = torch.where(sizes < torch.inf, sizes, 0)
    rows, columns = matrix.shape
    padding = (0, -columns % BLOCK, 0, -rows % block_format.block_rows)
    padded = torch.nn.functional.pad(sizes, padding)
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, block_format.block_rows))
    amax = blocks.amax(dim=(1, 3)).clamp_min(SMALLEST_AMAX)
    # By a tensor: on CUDA torch multiplies by the reciprocal of a plain number, another rounding.
    scales = amax / torch.full_like(amax, E4M3_MAX)
    return _ceil_to_power_of_two(scales) if block_format.powers_of_two else scales


def pack_exponents(scales: torch.Tensor) -> torch.Tensor:
    """int32 [rows, column blocks / 4] of scales [rows, column blocks] that are powers of two."""
    exponents = scales.view(torch.int32) >> 23
    exponents = torch.nn.functional.pad(exponents, (0, -scales.shape[1] % 4)).unflatten(1, (-1, 4))
    first, second, third, fourth = exponents.unbind(dim=2)
    packed: torch.Tensor = first | (second << 8) | (third << 16) | (fourth << 24)
    return packed


def _ceil_to_power_of_two(scales: torch.Tensor) -> torch.Tensor:
    bits: torch.Tensor = ((scales.view(torch.int32) + 0x7FFFFF) >> 23) << 23
    return bits.view(torch.float32)


def _rounded(
    matrix: torch.Tensor, of_blocks: torch.Tensor, block_format: BlockFormat
) -> torch.Tensor:
    rows, columns = matrix.shape
    scales = of_blocks.repeat_interleave(block_format.block_rows, dim=0)[:rows]
    scales = scales.repeat_interleave(BLOCK, dim=1)[:, :columns]
    scaled = matrix.float() * scales.reciprocal()
    values = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    bits: torch.Tensor = torch.where(scaled.isfinite(), values.view(torch.uint8), NAN_BYTE)
    return bits.view(torch.float8_e4m3fn)
