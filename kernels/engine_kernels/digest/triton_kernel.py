"""The digest as one Triton kernel: two multiplications of 32 bits for each element."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

__all__ = ["OPTIONS", "add_digest", "constants", "digest_kernel"]

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
MOST_COLUMNS = 2048
"""16 columns a thread, which share what the key of a row costs: as much as some 8 elements."""
LEAST_COLUMNS = 128
ROWS_AT_ONCE = 4
"""Rows whose loads are under way together."""
ROWS_OF_A_PROGRAM = 32
UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def add_digest(
    words: torch.Tensor, into: torch.Tensor, shape: Sequence[int], start: Sequence[int]
) -> None:
    """`words`, integers of any size and strides, is a box at `start` of `shape`; it was checked."""
    unsigned = words.view(UNSIGNED[words.element_size()])
    columns = words.shape[-1]
    chosen = constants(columns, words.element_size())
    column_tiles = triton.cdiv(columns, chosen["TILE_COLUMNS"])
    for piece, first_row, (outer, rows), pitches, steps in _pieces(unsigned, shape, start):
        grid = (column_tiles, triton.cdiv(rows, ROWS_OF_A_PROGRAM), outer)
        with torch.cuda.device_of(words):
            digest_kernel[grid](
                piece,
                into,
                first_row,
                start[-1],
                rows,
                columns,
                *pitches,
                words.stride(-1),
                *steps,
                **chosen,
                **OPTIONS,
            )


def constants(columns: int, element_bytes: int) -> dict[str, int]:
    """What is compiled into the kernel."""
    fitting = triton.next_power_of_2(columns)
    return {
        "TILE_COLUMNS": max(LEAST_COLUMNS, min(MOST_COLUMNS, fitting)),
        "ROWS_AT_ONCE": ROWS_AT_ONCE,
        "ROWS_OF_A_PROGRAM": ROWS_OF_A_PROGRAM,
        "WIDE": element_bytes == 8,
    }


Pair = tuple[int, int]


def _pieces(
    words: torch.Tensor, shape: Sequence[int], start: Sequence[int]
) -> Iterator[tuple[torch.Tensor, int, Pair, Pair, Pair]]:
    """What one launch takes: (memory, its first row, sizes, pitches, steps of the row number).

    Axes that follow each other in memory and in the row's number are one. Two are left of nearly
    every box of weights; further ones take a launch for each index.
    """
    numbering = [1]
    for whole in reversed(shape[1:-1]):
        numbering.insert(0, numbering[0] * whole)
    first_row = sum(first * step for first, step in zip(start[:-1], numbering, strict=False))
    axes: list[tuple[int, int, int]] = []
    for size, pitch, step in zip(words.shape[:-1], words.stride(), numbering, strict=False):
        if size == 1:
            continue
        if axes and axes[-1][1:] == (size * pitch, size * step):
            axes[-1] = (axes[-1][0] * size, pitch, step)
        else:
            axes.append((size, pitch, step))
    axes = [(1, 0, 0)] * (2 - len(axes)) + axes
    *others, outer, inner = axes
    sizes, pitches, steps = zip(outer, inner, strict=True)
    for place in itertools.product(*(range(size) for size, _, _ in others)):
        skipped = sum(at * pitch for at, (_, pitch, _) in zip(place, others, strict=True))
        row = sum(at * step for at, (_, _, step) in zip(place, others, strict=True))
        memory = words.as_strided((1,), (1,), words.storage_offset() + skipped)
        yield memory, first_row + row, sizes, pitches, steps


@triton.jit
def digest_kernel(
    memory,
    into,
    first_row,
    first_column,
    rows,
    columns,
    outer_pitch,
    row_pitch,
    column_pitch,
    outer_step,
    row_step,
    TILE_COLUMNS: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    ROWS_OF_A_PROGRAM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The sum over ROWS_OF_A_PROGRAM rows and TILE_COLUMNS columns, added to `into`.

    Rows are added up first, each times its key: the columns' keys are then multiplied once. The +1
    of the elements is the product of both sums of keys.
    """
    rows_before = tl.program_id(1) * ROWS_OF_A_PROGRAM
    rows = tl.minimum(rows - rows_before, ROWS_OF_A_PROGRAM)
    own_row = rows_before.to(tl.int64)
    outer = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    memory += outer * outer_pitch + own_row * row_pitch + column.to(tl.int64) * column_pitch
    number = first_row + outer * outer_step + own_row * row_step

    low = tl.zeros([TILE_COLUMNS], tl.uint64)
    high = tl.zeros([TILE_COLUMNS], tl.uint32)
    of_rows = tl.zeros([1], tl.uint64)
    for begin in range(0, rows, ROWS_AT_ONCE):
        for each in tl.static_range(ROWS_AT_ONCE):
            row = begin + each
            is_row = row < rows
            inside = column < tl.where(is_row, columns, 0)
            element = tl.load(memory + row * row_pitch, inside, other=0)
            key = _odd_splitmix64(number + row * row_step, 0x9E3779B97F4A7C15)
            of_rows += tl.where(is_row, key, 0)
            if WIDE:
                low += element * key
            else:
                low += element.to(tl.uint64) * key.to(tl.uint32).to(tl.uint64)
                high += element.to(tl.uint32) * (key >> 32).to(tl.uint32)
    column_key = _odd_splitmix64((first_column + column).to(tl.int64), 0xD1B54A32D192ED03)
    column_key = tl.where(column < columns, column_key, 0)
    elements = (low + (high.to(tl.uint64) << 32)) * column_key
    total = tl.sum(elements, axis=0) + tl.sum(of_rows, axis=0) * tl.sum(column_key, axis=0)
    tl.atomic_add(into, total.to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def _odd_splitmix64(number, salt):
    mixed = (number.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15 + salt
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
    return (mixed ^ (mixed >> 31)) | 1
