"""Block FP8 back to bf16 or fp32, into the caller's buffer."""

from __future__ import annotations

import torch

from engine_kernels.block_format import BlockFormat, as_experts
from engine_kernels.dispatch import implementation

__all__ = ["dequantize_blocks"]


@torch.no_grad()
def dequantize_blocks(
    values: torch.Tensor,
    scales: torch.Tensor,
    weights: torch.Tensor,
    block_format: BlockFormat | None = None,
) -> None:
    """Write `values * scales` into `weights`: the product in float32, then rounded to its dtype.

    Args:
        values: as `quantize_blocks` writes them; NaN stays NaN.
        scales: likewise.
        weights: the same shape as `values`, bf16 or fp32, last axis contiguous.
        block_format: HF's blocks of 128 x 128 with float32 scales if left out.

    Raises:
        BufferMismatchError: a tensor is not of this kind; nothing was written.
    """
    block_format = block_format or BlockFormat()
    block_format.check("weights", weights, values, scales)
    if weights.numel() == 0:
        return
    experts = (as_experts(values), as_experts(scales), as_experts(weights))
    implementation(__name__, weights.device).dequantize_blocks(*experts, block_format)
