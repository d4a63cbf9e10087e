"""What block FP8 does to weights: scales, errors of a round trip, and what is not a number."""

from __future__ import annotations

import pytest
import torch

from engine_kernels import BlockFormat, dequantize_blocks, quantize_blocks
from tests.kernels.hard_weights import FORMATS, hard_weights, poisoned

SPREAD, SMALL, TIES, HUGE, TINY, ZEROS, BROKEN, ALL_BROKEN = range(8)


def scales_of_elements(
    scales: torch.Tensor, shape: torch.Size, block_format: BlockFormat
) -> torch.Tensor:
    """Each element's scale, by dequantizing values that are all 1."""
    ones, wide = torch.ones(shape).to(torch.float8_e4m3fn), torch.empty(shape)
    dequantize_blocks(ones, scales, wide, block_format)
    return wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_the_error_of_a_round_trip_is_bounded(
    block_format: BlockFormat, dtype: torch.dtype
) -> None:
    """A sixteenth of the weight or a 1024th of its scale, whichever is more."""
    weights = hard_weights(190, 270, dtype, 3)[:BROKEN]
    values, scales = poisoned(block_format, weights.shape, 0x7F)
    quantize_blocks(weights, values, scales, block_format)
    back = torch.full(weights.shape, torch.nan)
    dequantize_blocks(values, scales, back, block_format)
    scale = scales_of_elements(scales, weights.shape, block_format).double()
    wide = weights.double()
    bound = torch.maximum(wide.abs() / 16, scale / 1024) * (1 + 2.0**-18)
    held = wide.abs() <= 2.0**127
    assert bool(((back.double() - wide).abs() <= bound)[held].all())


@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_scales_are_amax_over_448_or_the_next_power_of_two(block_format: BlockFormat) -> None:
    weights = hard_weights(128, 128, torch.float32, 3)[:BROKEN]
    values, scales = poisoned(block_format, weights.shape, 0x7F)
    quantize_blocks(weights, values, scales, block_format)
    seen = scales_of_elements(scales, weights.shape, block_format)
    axes = (1, 2) if block_format.block_rows == 128 else (2,)
    exact = weights.abs().amax(dim=axes, keepdim=True).clamp_min(1e-4) / torch.tensor(448.0)
    if block_format.powers_of_two:
        assert bool((seen.frexp().mantissa == 0.5).all())
        assert bool(((exact <= seen) & (seen < 2 * exact)).all())
    else:
        assert torch.equal(seen, exact.expand_as(seen))


@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_what_is_not_finite_is_nan_and_leaves_its_neighbours_alone(
    block_format: BlockFormat,
) -> None:
    weights = hard_weights(129, 130, torch.bfloat16, 3)[BROKEN:]
    finite = weights.isfinite()
    values, scales = poisoned(block_format, weights.shape, 0)
    quantize_blocks(weights, values, scales, block_format)
    assert torch.equal(values.float().isfinite(), finite)
    assert bool((values.view(torch.uint8)[~finite] == 0x7F).all())
    clean_values, clean_scales = poisoned(block_format, weights.shape, 0)
    quantize_blocks(weights.where(finite, 0), clean_values, clean_scales, block_format)
    assert torch.equal(scales, clean_scales)
    assert torch.equal(values.float()[finite], clean_values.float()[finite])


def test_zeros_keep_their_sign_and_have_the_smallest_scale() -> None:
    zeros = hard_weights(128, 128, torch.bfloat16, 3)[ZEROS]
    values, scales = poisoned(BlockFormat(), zeros.shape, 0x7F)
    quantize_blocks(zeros, values, scales)
    assert torch.equal(values.view(torch.uint8) == 0x80, zeros.signbit())
    assert scales.item() == torch.tensor(1e-4).div(torch.tensor(448.0)).item()
