"""Block FP8 quantization into the caller's values and scales."""

from __future__ import annotations

import torch

from engine_kernels.block_format import BlockFormat, as_experts
from engine_kernels.dispatch import implementation

__all__ = ["quantize_blocks"]


@torch.no_grad()
def quantize_blocks(
    weights: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    block_format: BlockFormat | None = None,
) -> None:
    """Quantize `weights` to e4m3, each block with its own scale, all experts in one launch.

    `scale = max(amax, 1e-4) / 448` in float32, for powers of two rounded up to one; `value =
    weight * (1 / scale)` in float32, rounded to nearest even, at most 448 in magnitude. These are
    the operations of DeepGEMM's `per_block_cast_to_fp8`, of which vLLM and SGLang have copies.
    For weights up to 2**127 element by element
    `|values * scales - weights| <= max(|weights| / 16, scales / 1024)`, but for the roundings of
    float32: 2**-18 of the right side. Beyond, a power of two may round up to infinity.

    What is not finite becomes NaN (0x7f) and does not count for amax: it stays to be seen, and
    costs its neighbours nothing. Blocks of zeros get the smallest scale. Negative zeros, and
    negative weights that round to zero, give 0x80.

    Args:
        weights: [rows, columns] or [experts, rows, columns], bf16 or fp32, last axis contiguous.
        values: the same shape, float8_e4m3fn, each matrix contiguous at a multiple of 16 bytes;
            matrices may be apart, as one half of a gate-up parameter's are.
        scales: as `BlockFormat.scale_shape` and `scale_strides` say. Every element is written; the
            padding between columns of column-major layouts is not.
        block_format: HF's blocks of 128 x 128 with float32 scales if left out.

    Raises:
        BufferMismatchError: a tensor is not of this kind; nothing was written.
    """
    block_format = block_format or BlockFormat()
    block_format.check("weights", weights, values, scales)
    if weights.numel() == 0:
        return
    experts = (as_experts(weights), as_experts(values), as_experts(scales))
    implementation(__name__, weights.device).quantize_blocks(*experts, block_format)
