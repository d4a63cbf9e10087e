"""Triton kernels give the bits of their references, interpreted on the CPU."""

from __future__ import annotations

import pytest

from tests.kernels import interpreted
from tests.kernels.hard_weights import FORMATS
from tests.kernels.interpreted import in_interpreter

EVERY_FORMAT = list(range(len(FORMATS)))
WEIGHTS_AND_PACKED_GROUPS = [0, len(FORMATS) - 1]


@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "formats"),
    [
        ("bf16", 40, 130, EVERY_FORMAT),
        ("fp32", 129, 130, EVERY_FORMAT),
        ("bf16", 63, 1000, WEIGHTS_AND_PACKED_GROUPS),
        ("fp32", 1, 1, WEIGHTS_AND_PACKED_GROUPS),
    ],
)
def test_quantized_bits_are_the_references(
    dtype: str, rows: int, columns: int, formats: list[int]
) -> None:
    """Odd shapes, eight kinds of hard weights as experts of one launch, poisoned outputs."""
    assert in_interpreter(interpreted.quantized, dtype, rows, columns, formats, 7) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_dequantized_bits_are_the_references_in_every_format(dtype: str) -> None:
    assert in_interpreter(interpreted.dequantized, dtype, 63, 300, 11) == []


def test_copies_are_the_references() -> None:
    assert in_interpreter(interpreted.copied) == []


def test_digests_are_the_references() -> None:
    assert in_interpreter(interpreted.digested, 5) == []
