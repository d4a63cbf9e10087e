"""Blocks of a tensor that several boxes share, and the largest value that these agree upon.

Shards are seldom cut on the edges of blocks. A block's scale follows from its largest value, and
whoever holds a part of the block needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Blocks", "Maxima", "Piece", "Run", "SharedBlocks", "pieces_of"]

Amax = npt.NDArray[np.float32]
"""[block rows, block columns] largest absolute values."""


class SharedBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """What one process holds of some blocks that reach beyond its box."""

    name: str
    first: tuple[int, int]
    """Row and column of the first block in the tensor's grid of blocks."""
    shape: tuple[int, int]
    amax: bytes
    """Largest absolute values, little-endian float32, row by row."""


class Run(NamedTuple):
    """Indices on one axis of the whole tensor: whole blocks, or a part of one."""

    start: int
    stop: int
    cut: bool


class Blocks(NamedTuple):
    """Blocks of a tensor's grid."""

    rows: range
    columns: range

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return len(self.rows), len(self.columns)

    def within(self, start: Sequence[int]) -> tuple[slice, slice]:
        """The blocks as an index into something that begins at `start`."""
        row, column = start
        return (
            slice(self.rows.start - row, self.rows.stop - row),
            slice(self.columns.start - column, self.columns.stop - column),
        )


class Piece(NamedTuple):
    """A part of a box: whole blocks, or parts of blocks that others hold the rest of."""

    rows: Run
    columns: Run

    @property
    def is_cut(self) -> bool:
        """Whether others hold the rest of these blocks."""
        return self.rows.cut or self.columns.cut

    def blocks(self, block: int) -> Blocks:
        """The blocks that it lies in."""
        rows, columns = (range(run.start // block, -(-run.stop // block)) for run in self)
        return Blocks(rows, columns)

    def owned_blocks(self, block: int) -> Blocks:
        """Those whose first element it holds: each block is owned once."""
        rows, columns = (range(-(-run.start // block), -(-run.stop // block)) for run in self)
        return Blocks(rows, columns)

    def within(self, start: Sequence[int]) -> tuple[slice, slice]:
        """The piece as an index into something that begins at `start`."""
        rows, columns = (
            slice(run.start - first, run.stop - first)
            for run, first in zip(self, start, strict=True)
        )
        return rows, columns


def pieces_of(
    start: Sequence[int], shape: Sequence[int], whole: Sequence[int], block: int
) -> list[Piece]:
    """Take a box of a matrix apart on the edges of blocks; at most nine pieces."""
    rows, columns = (
        list(_runs(first, first + extent, limit, block))
        for first, extent, limit in zip(start, shape, whole, strict=True)
    )
    return [Piece(*pair) for pair in product(rows, columns)]


class Maxima:
    """The largest values that all processes together have told of shared blocks.

    Args:
        told: what each process says.
        grids: by tensor, the rows and columns of its blocks; others are not kept.
    """

    def __init__(self, told: Iterable[SharedBlocks], grids: dict[str, tuple[int, int]]) -> None:
        self._grids = {name: np.zeros(shape, np.float32) for name, shape in grids.items()}
        for blocks in told:
            grid = self._grids.get(blocks.name)
            if grid is not None:
                (row, column), (rows, columns) = blocks.first, blocks.shape
                amax = np.frombuffer(blocks.amax, "<f4").reshape(blocks.shape)
                place = grid[row : row + rows, column : column + columns]
                np.maximum(place, amax, out=place)

    def of(self, name: str, blocks: Blocks) -> torch.Tensor:
        """[rows, columns] float32 of some blocks of a tensor."""
        return torch.from_numpy(self._grids[name][blocks.within((0, 0))])


def _runs(start: int, stop: int, extent: int, block: int) -> Iterator[Run]:
    if start == stop:
        return
    first = -(-start // block) * block
    last = stop if stop == extent else stop // block * block
    if first >= stop:
        yield Run(start, stop, cut=True)
        return
    if start < first:
        yield Run(start, first, cut=True)
    if first < last:
        yield Run(first, last, cut=False)
    if last < stop:
        yield Run(last, stop, cut=True)
