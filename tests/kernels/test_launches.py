"""Around a launch nothing is allocated, and one launch does all experts, all boxes."""

from __future__ import annotations

from contextlib import ExitStack
from importlib import import_module
from types import ModuleType
from typing import Any, Self
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine_kernels import (
    BlockFormat,
    BoxTable,
    add_digest,
    dequantize_blocks,
    gather_strided,
    quantize_blocks,
    scatter_strided,
)
from tests.kernels.compiled import Launch, captured
from tests.kernels.hard_weights import FORMATS, hard_weights, poisoned
from tests.kernels.strided_boxes import BOXES, ELEMENTS

KERNELS = {
    "block_quantize": "quantize_kernel",
    "block_dequantize": "dequantize_kernel",
    "strided_copy": "copy_kernel",
    "digest": "digest_kernel",
}
VIEWS = {"view", "unsqueeze", "as_strided", "slice", "detach", "alias"}


class Operations(TorchDispatchMode):
    """What the public functions ask of torch, and of triton, whose kernels do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.launches: list[Launch] = []
        self._patches = ExitStack()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        def implementation(operation: str, device: torch.device) -> ModuleType:
            return import_module(f"{operation}.triton_kernel")

        for operation, kernel in KERNELS.items():
            module = import_module(f"engine_kernels.{operation}")
            self._patches.enter_context(patch.object(module, "implementation", implementation))
            kernels = import_module(f"engine_kernels.{operation}.triton_kernel")
            self._launches_of(kernels, kernel)
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def _launches_of(self, module: ModuleType, kernel: str) -> None:
        noted = self._patches.enter_context(captured(module, kernel))
        self._patches.callback(lambda: self.launches.extend(noted))


@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_experts_are_quantized_in_one_launch_without_an_allocation(
    block_format: BlockFormat,
) -> None:
    weights = hard_weights(130, 260, torch.bfloat16, 1)
    values, scales = poisoned(block_format, weights.shape, 0)
    with Operations() as operations:
        quantize_blocks(weights, values, scales, block_format)
        dequantize_blocks(values, scales, weights, block_format)
    assert len(operations.launches) == 2
    assert operations.seen <= VIEWS


def test_boxes_are_copied_in_one_launch_without_an_allocation() -> None:
    table = BoxTable(BOXES["many sizes"], torch.bfloat16, "cpu")
    storage, packed = torch.zeros(2, ELEMENTS, dtype=torch.bfloat16).unbind()
    with Operations() as operations:
        gather_strided(storage, packed, table)
        scatter_strided(packed, storage, table)
    assert len(operations.launches) == 2
    assert operations.seen <= VIEWS


def test_boxes_are_digested_without_an_allocation() -> None:
    """In one launch, unless more than two axes before the last are cut."""
    tensor = torch.zeros(3, 4, 5, 6)
    cut, into = tensor[:, :, 1:3, 2:4], torch.zeros(1, dtype=torch.int64)
    cut_everywhere = tensor[:2, :3, 1:3, 2:4]
    with Operations() as operations:
        add_digest(tensor, into)
        add_digest(cut, into, shape=(3, 4, 5, 6), start=(0, 0, 1, 2))
        add_digest(cut_everywhere, into, shape=(3, 4, 5, 6), start=(0, 0, 1, 2))
    assert len(operations.launches) == 1 + 1 + 2
    assert operations.seen <= VIEWS
