"""Kernels on a real GPU give the bits of their references, on fresh random data each time.

Nothing here has run yet: no GPU was there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine_kernels import (
    BlockFormat,
    BoxTable,
    add_digest,
    dequantize_blocks,
    gather_strided,
    quantize_blocks,
    scatter_strided,
)
from engine_kernels.block_dequantize import reference as dequantize_reference
from engine_kernels.block_quantize import reference as quantize_reference
from tests.kernels.hard_weights import FORMATS, hard_weights, poisoned
from tests.kernels.strided_boxes import BOXES, ELEMENTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this process has no CUDA device"),
]

DEVICE = "cuda:0"
SHAPES = [(63, 1000), (129, 641), (1024, 2048)]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture
def seed() -> int:
    """Another one in each run; a failure prints it."""
    chosen = torch.seed() % 2**31
    print(f"seed {chosen}")
    return chosen


def allocations_of(work: Callable[..., None], *arguments: Any) -> int:
    """How many blocks torch's allocator gives out meanwhile, once everything is compiled."""
    work(*arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    work(*arguments)
    return int(torch.cuda.memory_stats()["allocation.all.allocated"] - before)


@pytest.mark.parametrize("in_hardware", [True, False])
@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_quantized_bits_are_the_references(
    block_format: BlockFormat, in_hardware: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded by the hardware where it can, and by integers; nothing is allocated."""
    from engine_kernels.block_quantize import triton_kernel

    if in_hardware and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no conversion to e4m3")
    monkeypatch.setattr(triton_kernel, "_rounds_in_hardware", lambda device: in_hardware)
    for (rows, columns), dtype in itertools.product(SHAPES, DTYPES):
        weights = hard_weights(rows, columns, dtype, seed).to(DEVICE)
        values, scales = poisoned(block_format, weights.shape, 0x5A, DEVICE)
        expected = poisoned(block_format, weights.shape, 0x25, DEVICE)

        assert allocations_of(quantize_blocks, weights, values, scales, block_format) == 0
        quantize_reference.quantize_blocks(weights, *expected, block_format)
        assert torch.equal(values.view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(scales, expected[1])


@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_dequantized_bits_are_the_references(block_format: BlockFormat, seed: int) -> None:
    for (rows, columns), dtype in itertools.product(SHAPES, DTYPES):
        source = hard_weights(rows, columns, dtype, seed).to(DEVICE)
        values, scales = poisoned(block_format, source.shape, 0, DEVICE)
        quantize_blocks(source, values, scales, block_format)
        weights, expected = (torch.full_like(source, torch.nan) for _ in range(2))
        dequantize_blocks(values, scales, weights, block_format)
        dequantize_reference.dequantize_blocks(values, scales, expected, block_format)
        assert torch.equal(weights.isnan(), expected.isnan())
        assert torch.equal(weights.nan_to_num(0.5), expected.nan_to_num(0.5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("name", BOXES)
def test_copies_are_the_references(name: str, dtype: torch.dtype) -> None:
    on_host, on_device = (BoxTable(BOXES[name], dtype, where) for where in ("cpu", DEVICE))
    source = torch.randint(0, 120, (ELEMENTS,)).to(dtype)
    for copy in (gather_strided, scatter_strided):
        expected = torch.full((ELEMENTS,), 121, dtype=dtype)
        given, target = source.to(DEVICE), expected.to(DEVICE)
        copy(source, expected, on_host)
        assert allocations_of(copy, given, target, on_device) == 0
        assert torch.equal(target.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_digests_are_the_references_and_add_up(dtype: torch.dtype) -> None:
    """On the GPU by the kernel, on the host by the reference; whole, and in four boxes."""
    tensor = torch.randint(0, 256, (5, 700, 1100 * dtype.itemsize)).to(torch.uint8).view(dtype)
    expected = torch.zeros(1, dtype=torch.int64)
    add_digest(tensor, expected)
    held = tensor.to(DEVICE)
    whole, parts = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    add_digest(held, whole)
    for rows, columns in itertools.product(((0, 333), (333, 700)), ((0, 77), (77, 1100))):
        box = held[:, slice(*rows), slice(*columns)]
        add_digest(box, parts, shape=held.shape, start=(0, rows[0], columns[0]))
    assert whole.item() == parts.item() == expected.item()
    assert allocations_of(add_digest, held, whole) == 0
