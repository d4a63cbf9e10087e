"""What block FP8 dequantization computes, in plain torch."""

from __future__ import annotations

import torch

from engine_kernels.block_format import BLOCK, BlockFormat

__all__ = ["dequantize_blocks", "unpack_exponents"]


def dequantize_blocks(
    values: torch.Tensor,
    scales: torch.Tensor,
    weights: torch.Tensor,
    block_format: BlockFormat,
) -> None:
    """Expert by expert: [experts, rows, columns]; buffers were checked."""
    rows, columns = weights.shape[1:]
    for value, scale, matrix in zip(values, scales, weights, strict=True):
        if block_format.is_packed:
            of_rows = unpack_exponents(scale)
        else:
            of_rows = scale.repeat_interleave(block_format.block_rows, dim=0)[:rows]
        matrix.copy_(value.float() * of_rows.repeat_interleave(BLOCK, dim=1)[:, :columns])


def unpack_exponents(packed: torch.Tensor) -> torch.Tensor:
    """float32 [rows, 4 * words] of int32 [rows, words]: the inverse of packing exponents."""
    exponents = torch.stack([(packed >> shift) & 0xFF for shift in (0, 8, 16, 24)], dim=2)
    return (exponents << 23).flatten(1).view(torch.float32)
