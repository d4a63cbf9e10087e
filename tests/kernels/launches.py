"""The launches of every kernel at sizes of real models: what tests compile and benchmarks time."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch

from engine_kernels import BlockFormat, BoxTable, ScaleLayout, StridedBox
from engine_kernels.block_dequantize import triton_kernel as dequantize
from engine_kernels.block_quantize import triton_kernel as quantize
from engine_kernels.digest import triton_kernel as digest
from engine_kernels.strided_copy import triton_kernel as strided_copy
from tests.kernels.compiled import Launch, captured

__all__ = ["LAUNCHES"]

PACKED = ScaleLayout.PACKED_UE8M0
WEIGHTS = BlockFormat()
PACKED_WEIGHTS = BlockFormat(powers_of_two=True, layout=PACKED)
PACKED_GROUPS = BlockFormat(block_rows=1, powers_of_two=True, layout=PACKED)


def _quantize(
    block_format: BlockFormat, dtype: torch.dtype, columns: int = 512, *, hardware: bool = True
) -> Launch:
    weights = torch.empty(2, 256, columns, dtype=dtype)
    values = torch.empty(weights.shape, dtype=torch.float8_e4m3fn)
    scales = block_format.new_scales(weights.shape, "cpu")
    with (
        patch.object(quantize, "_rounds_in_hardware", lambda _: hardware),
        captured(quantize, "quantize_kernel") as launches,
    ):
        quantize.quantize_blocks(weights, values, scales, block_format)
    return launches[0]


def _dequantize(block_format: BlockFormat) -> Launch:
    weights = torch.empty(2, 256, 512, dtype=torch.bfloat16)
    values = torch.empty(weights.shape, dtype=torch.float8_e4m3fn)
    scales = block_format.new_scales(weights.shape, "cpu")
    with captured(dequantize, "dequantize_kernel") as launches:
        dequantize.dequantize_blocks(values, scales, weights, block_format)
    return launches[0]


def _copy(columns: int) -> Launch:
    box = StridedBox(offset=columns, rows=256, columns=columns, pitch=2 * columns, packed_offset=0)
    storage, packed = (torch.empty(n * columns, dtype=torch.bfloat16) for n in (512, 256))
    table = BoxTable([box], torch.bfloat16, "cpu")
    with captured(strided_copy, "copy_kernel") as launches:
        strided_copy.copy_boxes(storage, packed, table, gathers=True)
    return launches[0]


def _digest(dtype: torch.dtype) -> Launch:
    box = torch.empty(64, 4096, dtype=dtype)
    into = torch.zeros(1, dtype=torch.int64)
    with captured(digest, "digest_kernel") as launches:
        digest.add_digest(box, into, box.shape, (0, 0))
    return launches[0]


LAUNCHES: dict[str, Callable[[], Launch]] = {
    "quantize bf16, 128x128, float32": lambda: _quantize(WEIGHTS, torch.bfloat16),
    "quantize fp32, 128x128, float32": lambda: _quantize(WEIGHTS, torch.float32),
    "quantize bf16, 128x128, packed": lambda: _quantize(PACKED_WEIGHTS, torch.bfloat16),
    "quantize bf16, 1x128, packed": lambda: _quantize(PACKED_GROUPS, torch.bfloat16),
    "quantize bf16, 128x128, 1000 columns": lambda: _quantize(WEIGHTS, torch.bfloat16, 1000),
    "dequantize bf16, 128x128, float32": lambda: _dequantize(WEIGHTS),
    "copy of 16-byte units": lambda: _copy(1024),
    "digest, 2 bytes": lambda: _digest(torch.int16),
    "digest, 4 bytes": lambda: _digest(torch.int32),
}
