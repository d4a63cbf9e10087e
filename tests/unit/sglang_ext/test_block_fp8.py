"""Our block FP8 gives the bits that SGLang's own functions give, packed scales included."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from engine_kernels import BlockFormat, ScaleLayout, quantize_blocks


@pytest.fixture
def deep_gemm_utils(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two sums that SGLang's packing in torch takes from DeepGEMM, which needs a GPU."""
    module = ModuleType("deep_gemm.utils")
    module.__dict__["align"] = lambda size, unit: -(-size // unit) * unit
    module.__dict__["get_tma_aligned_size"] = lambda size, bytes_each: (
        -(-size * bytes_each // 16) * 16 // bytes_each
    )
    parent = ModuleType("deep_gemm")
    layout = ModuleType("deep_gemm.utils.layout")
    for name, each in {"": parent, ".utils": module, ".utils.layout": layout}.items():
        monkeypatch.setitem(sys.modules, f"deep_gemm{name}", each)
    parent.__dict__["utils"], module.__dict__["layout"] = module, layout


@pytest.mark.usefixtures("deep_gemm_utils")
@pytest.mark.parametrize(("rows", "columns"), [(300, 520), (257, 1100), (128, 128)])
def test_bits_are_those_of_sglangs_weights_for_deep_gemm(rows: int, columns: int) -> None:
    from sglang.srt.layers.quantization.fp8_utils import (
        per_block_cast_to_fp8,
        transform_scale_ue8m0,
    )

    weights = torch.randn(rows, columns) * torch.exp2(torch.randint(-12, 12, (rows, columns)))
    weights[:128, :128] = 0
    weights = weights.bfloat16()
    own_values, own_scales = per_block_cast_to_fp8(weights)
    own_packed = transform_scale_ue8m0(own_scales, mn=rows, use_torch_impl=True)
    for layout, expected in {
        ScaleLayout.ROW_MAJOR: own_scales,
        ScaleLayout.PACKED_UE8M0: own_packed,
    }.items():
        block_format = BlockFormat(powers_of_two=True, layout=layout)
        values = torch.empty(weights.shape, dtype=torch.float8_e4m3fn)
        scales = block_format.new_scales(weights.shape, "cpu")
        quantize_blocks(weights, values, scales, block_format)
        assert torch.equal(values.view(torch.uint8), own_values.view(torch.uint8))
        assert scales.dtype == expected.dtype
        assert torch.equal(scales, expected)
        assert scales.stride() == expected.stride()
