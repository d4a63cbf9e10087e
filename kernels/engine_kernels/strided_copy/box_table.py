"""Which boxes of a storage go where, cut into the tiles that a kernel's programs copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine_kernels.buffers import (
    BufferMismatchError,
    require_address,
    require_device,
    require_dtype,
)

__all__ = ["TILE_WORDS", "BoxTable", "StridedBox"]

WIDEST_ACCESS_BYTES = 16
WIDEST_WORD_BYTES = 8
TILE_WORDS = 2048
"""16 KiB of the widest words for one program."""
MOST_COLUMNS = 1024


@dataclass(frozen=True, kw_only=True)
class StridedBox:
    """Rows of `columns` elements, `pitch` apart from `offset` on; contiguous at `packed_offset`.

    All in elements. A run without gaps is a box of one row.

    Raises:
        ValueError: a number is negative, or rows overlap.
    """

    offset: int
    rows: int
    columns: int
    pitch: int
    packed_offset: int

    def __post_init__(self) -> None:
        if min(self.offset, self.rows, self.columns, self.pitch, self.packed_offset) < 0:
            raise ValueError(f"{self} has a negative number")
        if self.rows > 1 and self.pitch < self.columns:
            raise ValueError(f"rows of {self} overlap: the pitch is less than the columns")

    @property
    def end(self) -> int:
        return self.offset + (self.rows - 1) * self.pitch + self.columns

    @property
    def packed_end(self) -> int:
        return self.packed_offset + self.rows * self.columns


class BoxTable:
    """The boxes of one copy, made once for a device and a dtype; the copies then allocate nothing.

    Memory moves in the widest words that every offset, pitch and row is a multiple of.

    Args:
        boxes: any number; empty ones are left out.
        dtype: of both sides; only its size counts.
        device: where both sides will be.
    """

    def __init__(
        self, boxes: Sequence[StridedBox], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.boxes = tuple(box for box in boxes if box.rows and box.columns)
        self.dtype = dtype
        self.unit_bytes = _unit_bytes(self.boxes, dtype.itemsize)
        self.word_bytes = min(self.unit_bytes, WIDEST_WORD_BYTES)
        words = [box.columns * dtype.itemsize // self.word_bytes for box in self.boxes]
        self.tile_columns = min(1 << (max(words, default=1) - 1).bit_length(), MOST_COLUMNS)
        self.tile_rows = TILE_WORDS // self.tile_columns
        rows = [tile for box in self.boxes for tile in self._tiles(box)]
        self.tiles = torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, 6)

    def check(self, storage: torch.Tensor, packed: torch.Tensor) -> None:
        """Whether both sides are what this table speaks of.

        Raises:
            BufferMismatchError: dtype, device, strides, address or length of one is not.
        """
        ends = (
            max((box.end for box in self.boxes), default=0),
            max((box.packed_end for box in self.boxes), default=0),
        )
        for tensor, name, end in zip((storage, packed), ("storage", "packed"), ends, strict=True):
            require_dtype(tensor, name, (self.dtype,))
            require_device(tensor, name, self.tiles.device)
            if tensor.dim() != 1 or not tensor.is_contiguous():
                raise BufferMismatchError(
                    f"{name} has shape {list(tensor.shape)} and strides {list(tensor.stride())}",
                    follows="offsets of boxes count elements of one contiguous run",
                    remedy=f"Give {name} as a flat view",
                )
            if tensor.numel() < end:
                raise BufferMismatchError(
                    f"{name} has {tensor.numel()} elements and the boxes end at {end}",
                    follows="the last of them would lie outside",
                    remedy="Give the whole buffer, or make the table for this one",
                )
            require_address(tensor, name, self.unit_bytes)

    def _tiles(self, box: StridedBox) -> list[list[int]]:
        """[strided offset, packed offset, rows, columns, pitch, packed pitch] of each, in words."""
        size, word = self.dtype.itemsize, self.word_bytes
        columns, pitch = box.columns * size // word, box.pitch * size // word
        if box.rows == 1:
            pitch = columns
        offset, packed_offset = box.offset * size // word, box.packed_offset * size // word
        return [
            [
                offset + row * pitch + column,
                packed_offset + row * columns + column,
                min(self.tile_rows, box.rows - row),
                min(self.tile_columns, columns - column),
                pitch,
                columns,
            ]
            for row in range(0, box.rows, self.tile_rows)
            for column in range(0, columns, self.tile_columns)
        ]


def _unit_bytes(boxes: Sequence[StridedBox], element_bytes: int) -> int:
    numbers = [WIDEST_ACCESS_BYTES]
    for box in boxes:
        pitch = box.pitch if box.rows > 1 else 0
        places = (box.offset, box.packed_offset, box.columns, pitch)
        numbers.extend(place * element_bytes for place in places)
    return math.gcd(*numbers)
