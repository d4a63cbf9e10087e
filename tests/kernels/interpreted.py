"""What runs where triton interprets kernels: in forks of a process that has not met triton.

TRITON_INTERPRET is read when triton is imported, for good, so kernels are imported in functions.
Each gives what was wrong, in words; an empty list is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from engine_kernels import (
    BoxTable,
    add_digest,
    dequantize_blocks,
    gather_strided,
    quantize_blocks,
    scatter_strided,
)
from tests.kernels.hard_weights import FORMATS, hard_weights, poisoned
from tests.kernels.strided_boxes import BOXES, ELEMENTS
from tests.support.after_import import run_after_import

__all__ = ["copied", "dequantized", "digested", "in_interpreter", "quantized"]

OPERATIONS = ("block_quantize", "block_dequantize", "strided_copy", "digest")
WIDE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def in_interpreter(function: Callable[..., list[str]], *arguments: Any) -> list[str]:
    """What a function of this module says there."""
    ((answer, said),) = run_after_import(function, [({"TRITON_INTERPRET": "1"}, arguments)])
    assert isinstance(answer, list), said
    return answer


@contextmanager
def triton_kernels() -> Iterator[None]:
    """The public functions take their Triton kernels for tensors of the CPU."""
    from triton import knobs

    assert knobs.runtime.interpret

    def implementation(operation: str, device: torch.device) -> ModuleType:
        return import_module(f"{operation}.triton_kernel")

    with ExitStack() as patches:
        for operation in OPERATIONS:
            module = import_module(f"engine_kernels.{operation}")
            patches.enter_context(patch.object(module, "implementation", implementation))
        yield


def quantized(dtype: str, rows: int, columns: int, formats: list[int], seed: int) -> list[str]:
    """Kernel against reference, from buffers with other bytes in them."""
    wrong = []
    weights = hard_weights(rows, columns, WIDE[dtype], seed)
    for block_format in (FORMATS[index] for index in formats):
        values, scales = poisoned(block_format, weights.shape, 0x5A)
        expected_values, expected_scales = poisoned(block_format, weights.shape, 0x25)
        quantize_blocks(weights, expected_values, expected_scales, block_format)
        with triton_kernels():
            quantize_blocks(weights, values, scales, block_format)
        same = values.view(torch.uint8) == expected_values.view(torch.uint8)
        for expert in (~same).flatten(1).any(dim=1).nonzero().flatten().tolist():
            wrong.append(f"values of {expert}, {rows} x {columns}, {block_format}")
        if not torch.equal(scales, expected_scales):
            wrong.append(f"scales, {rows} x {columns}, {block_format}")
    return wrong


def dequantized(dtype: str, rows: int, columns: int, seed: int) -> list[str]:
    """Kernel against reference, of all bytes and every format; NaN is NaN."""
    wrong = []
    generator = torch.Generator().manual_seed(seed)
    for block_format in FORMATS:
        shape = torch.Size((2, rows, columns))
        values, scales = poisoned(block_format, shape, 0)
        values.view(torch.uint8).copy_(torch.randint(0, 256, shape, generator=generator))
        source = hard_weights(rows, columns, torch.float32, seed)[:2]
        quantize_blocks(source, values.clone(), scales, block_format)
        expected = torch.full(shape, torch.nan, dtype=WIDE[dtype])
        dequantize_blocks(values, scales, expected, block_format)
        weights = torch.full(shape, 3.0, dtype=WIDE[dtype])
        with triton_kernels():
            dequantize_blocks(values, scales, weights, block_format)
        if not torch.equal(weights.isnan(), expected.isnan()):
            wrong.append(f"NaN, {block_format}")
        if not torch.equal(weights.nan_to_num(0.5), expected.nan_to_num(0.5)):
            wrong.append(f"values, {block_format}")
    return wrong


def copied() -> list[str]:
    """Kernel against reference, both ways, by every list of boxes and size of element."""
    wrong = []
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64):
        for name, boxes in BOXES.items():
            table = BoxTable(boxes, dtype, "cpu")
            bits = torch.randint(0, 120, (2, ELEMENTS), dtype=torch.uint8).to(dtype)
            for copy in (gather_strided, scatter_strided):
                expected, target = bits[1].clone(), bits[1].clone()
                copy(bits[0], expected, table)
                with triton_kernels():
                    copy(bits[0], target, table)
                if not torch.equal(target, expected):
                    wrong.append(f"{copy.__name__} of {name}, {dtype}")
    return wrong


def digested(seed: int) -> list[str]:
    """Kernel against reference, for boxes of every kind."""
    wrong = []
    generator = torch.Generator().manual_seed(seed)
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.int64):
        whole = torch.randint(0, 256, (3, 6, 5, 2100 * dtype.itemsize), generator=generator)
        memory = whole.to(torch.uint8).view(dtype)
        for name, box in {
            "whole": memory[:2, :, :, :300],
            "more columns than one tile": memory[0, 0],
            "a vector": memory[0, 0, 0, :700],
            "one element": memory[1, 1, 1, :1],
            "a scalar": memory[1, 1, 1, 1],
            "a cut matrix": memory[2, :, 3, 5:200],
            "rows of a plane": memory[:, 1:5, 0, :90],
            "four axes cut": memory[1:3, 2:4, 1:3, 7:20],
            "transposed": memory[0, :, :, 0:2].transpose(0, 2),
            "nothing": memory[:0],
        }.items():
            start = [17 * axis + 3 for axis in range(box.dim())]
            shape = [low + size + 5 for low, size in zip(start, box.shape, strict=True)]
            far = [*[low + (1 << 33) for low in start[:1]], *start[1:]]
            for first, of in ((start, shape), (far, [1 << 34, *shape[1:]][: box.dim()])):
                into, expected = torch.tensor([-3]), torch.tensor([-3])
                add_digest(box, expected, shape=of, start=first)
                with triton_kernels():
                    add_digest(box, into, shape=of, start=first)
                if not torch.equal(into, expected):
                    wrong.append(f"{name} at {first}, {dtype}: {into} and not {expected}")
    return wrong
