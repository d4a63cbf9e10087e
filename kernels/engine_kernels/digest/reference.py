"""What a digest is, in plain torch: int64 wraps as the unsigned numbers of the definition do."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["add_digest", "column_keys", "row_keys"]

ROW_SALT = 0x9E3779B97F4A7C15
COLUMN_SALT = 0xD1B54A32D192ED03
CHUNK_ELEMENTS = 1 << 20
"""Taken at once: the numbers of 8 bytes that stand for them are allocated."""


def add_digest(
    words: torch.Tensor, into: torch.Tensor, shape: Sequence[int], start: Sequence[int]
) -> None:
    """`words`, integers of any size and strides, is a box at `start` of `shape`; it was checked."""
    numbers = torch.zeros((), dtype=torch.int64, device=words.device)
    for size, whole, first in zip(words.shape[:-1], shape, start, strict=False):
        places = torch.arange(first, first + size, device=words.device)
        numbers = (numbers * whole)[..., None] + places
    keys = row_keys(numbers.reshape(-1))
    columns = words.shape[-1]
    column = column_keys(torch.arange(start[-1], start[-1] + columns, device=words.device))
    mask = (1 << 8 * words.element_size()) - 1 if words.element_size() < 8 else -1
    rows = words.reshape(-1, columns) if words.dim() > 1 else words[None]
    step = max(1, CHUNK_ELEMENTS // columns)
    for first in range(0, len(rows), step):
        bits = (rows[first : first + step].to(torch.int64) & mask) + 1
        of_rows = (bits * column).sum(dim=1)
        into += (of_rows * keys[first : first + step]).sum()


def row_keys(rows: torch.Tensor) -> torch.Tensor:
    """R of the definition for rows int64 [...]."""
    return _odd_splitmix64(rows, ROW_SALT)


def column_keys(columns: torch.Tensor) -> torch.Tensor:
    """C of the definition for columns int64 [...]."""
    return _odd_splitmix64(columns, COLUMN_SALT)


def _odd_splitmix64(numbers: torch.Tensor, salt: int) -> torch.Tensor:
    """The number-th output of splitmix64 (Steele, Lea, Flood 2014) begun at a salt, made odd."""
    mixed = (numbers + 1) * _signed(0x9E3779B97F4A7C15) + _signed(salt)
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    return (mixed ^ _shifted(mixed, 31)) | 1


def _shifted(numbers: torch.Tensor, places: int) -> torch.Tensor:
    """To the right with zeros from the left, which int64 does not do by itself."""
    return (numbers >> places) & ((1 << (64 - places)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
