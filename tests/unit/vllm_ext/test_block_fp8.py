"""Our block FP8 gives the bits that vLLM's own quantization gives."""

from __future__ import annotations

import pytest
import torch
from vllm.utils.deep_gemm import per_block_cast_to_fp8

from engine_kernels import BlockFormat, quantize_blocks


@pytest.mark.parametrize("powers_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_are_those_of_vllms_cast(dtype: torch.dtype, powers_of_two: bool) -> None:
    """Over many magnitudes, a block of zeros among them, and sizes that end within a block."""
    weights = torch.randn(300, 520) * torch.exp2(torch.randint(-12, 12, (300, 520)))
    weights[128:256, 128:256] = 0
    weights = weights.to(dtype)
    block_format = BlockFormat(powers_of_two=powers_of_two)
    values = torch.empty(weights.shape, dtype=torch.float8_e4m3fn)
    scales = block_format.new_scales(weights.shape, "cpu")
    quantize_blocks(weights, values, scales, block_format)
    own_values, own_scales = per_block_cast_to_fp8(weights, use_ue8m0=powers_of_two)
    assert torch.equal(scales, own_scales)
    assert torch.equal(values.view(torch.uint8), own_values.view(torch.uint8))
