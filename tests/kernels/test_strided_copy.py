"""Strided boxes packed and unpacked, as layouts of real models give them."""

from __future__ import annotations

import pytest
import torch

from engine_kernels import (
    BoxTable,
    BufferMismatchError,
    StridedBox,
    gather_strided,
    scatter_strided,
)
from tests.kernels.strided_boxes import BOXES, ELEMENTS, gate_up, query_key_value, row_parallel


def gathered(storage: torch.Tensor, boxes: list[StridedBox]) -> torch.Tensor:
    packed = torch.full((max(box.packed_end for box in boxes),), torch.nan, dtype=storage.dtype)
    gather_strided(storage.reshape(-1), packed, BoxTable(boxes, storage.dtype, "cpu"))
    return packed


def test_a_row_parallel_slice() -> None:
    matrix = torch.randn(96, 256)
    assert torch.equal(gathered(matrix, row_parallel(256, 4, 3)).view(96, 64), matrix[:, 192:])


def test_query_key_and_value_out_of_groups() -> None:
    rows = torch.randn(3, 6, 16, 32)
    packed = gathered(rows, query_key_value(32, 3, 4, 16)).view(-1, 32)
    query, key, value = packed.split([3 * 4 * 16, 3 * 16, 3 * 16])
    assert torch.equal(query.view(3, 4, 16, 32), rows[:, :4])
    assert torch.equal(key.view(3, 1, 16, 32), rows[:, 4:5])
    assert torch.equal(value.view(3, 1, 16, 32), rows[:, 5:])


def test_gate_and_up_out_of_each_ranks_halves() -> None:
    rows = torch.randn(4, 2, 8, 48)
    packed = gathered(rows, gate_up(48, 32, 4)).view(2, 4, 8, 48)
    assert torch.equal(packed, rows.transpose(0, 1))


@pytest.mark.parametrize("name", BOXES)
def test_scattering_undoes_gathering_and_touches_nothing_else(name: str) -> None:
    table = BoxTable(BOXES[name], torch.bfloat16, "cpu")
    storage = torch.randn(ELEMENTS).bfloat16()
    packed = torch.full((ELEMENTS,), torch.nan, dtype=torch.bfloat16)
    gather_strided(storage, packed, table)
    inside = torch.zeros(ELEMENTS, dtype=torch.bool)
    for box in table.boxes:
        inside.as_strided((box.rows, box.columns), (box.pitch, 1), box.offset).fill_(True)
    target = torch.full((ELEMENTS,), torch.nan, dtype=torch.bfloat16)
    scatter_strided(packed, target, table)
    assert torch.equal(target.isnan(), ~inside)
    assert torch.equal(target[inside], storage[inside])
    assert int((~packed.isnan()).sum()) == sum(box.rows * box.columns for box in table.boxes)


def test_words_are_the_widest_that_fit() -> None:
    def words(*numbers: int) -> tuple[int, int]:
        offset, columns, pitch = numbers
        box = StridedBox(offset=offset, rows=4, columns=columns, pitch=pitch, packed_offset=0)
        table = BoxTable([box], torch.bfloat16, "cpu")
        return table.word_bytes, table.unit_bytes

    assert words(64, 128, 256) == (8, 16)
    assert words(64, 128, 260) == (8, 8)
    assert words(64, 126, 256) == (4, 4)
    assert words(3, 128, 256) == (2, 2)


def test_tiles_cover_each_word_once() -> None:
    for boxes in BOXES.values():
        table = BoxTable(boxes, torch.float32, "cpu")
        covered = torch.zeros(ELEMENTS * 4 // table.word_bytes, dtype=torch.int64)
        for offset, _, rows, columns, pitch, _ in table.tiles.tolist():
            covered.as_strided((rows, columns), (pitch, 1), offset).add_(1)
        words = sum(box.rows * box.columns for box in boxes) * 4 // table.word_bytes
        assert covered.max() == 1
        assert covered.sum() == words


def test_what_does_not_fit_is_refused() -> None:
    boxes = row_parallel(256, 4, 3)
    table = BoxTable(boxes, torch.float32, "cpu")
    storage, packed = torch.zeros(96 * 256), torch.zeros(96 * 64)
    for given, said in {
        (storage[:-1], packed): "storage has 24575 elements and the boxes end at 24576",
        (storage, packed[:-1]): "packed has 6143 elements",
        (storage.view(96, 256), packed): r"storage has shape \[96, 256\]",
        (storage.double(), packed): "storage is float64, not float32",
        (torch.zeros(96 * 256 + 1)[1:], packed): "storage begins 4 bytes past a multiple of 16",
    }.items():
        with pytest.raises(BufferMismatchError, match=said):
            gather_strided(*given, table)
    with pytest.raises(ValueError, match="overlap"):
        StridedBox(offset=0, rows=2, columns=5, pitch=4, packed_offset=0)
    with pytest.raises(ValueError, match="negative"):
        StridedBox(offset=-1, rows=2, columns=5, pitch=5, packed_offset=0)
