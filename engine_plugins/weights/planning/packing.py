"""Short rows: read whole into the scratch area, as few large blocks, and spread from there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine_plugins.weights.planning.box_table import (
    Column,
    TensorTable,
    contiguous_strides,
    every,
    summed,
    volumes,
)
from engine_plugins.weights.planning.intersection import Parts, runs
from engine_plugins.weights.planning.plan_data import PackedBatch, PackedTable, PieceForm

__all__ = ["ALIGNMENT_BYTES", "SHORT_RUN_BYTES", "aligned", "in_batches", "packed_axis"]

ALIGNMENT_BYTES = 64
SHORT_RUN_BYTES = 16 * 1024
"""Below this, rows are fetched as one block and spread locally: a descriptor costs as much as
moving so many bytes (docs/decisions.md, D7 and D27)."""


def packed_axis(parts: Parts, tensors: TensorTable, scratch: int) -> Column:
    """[n] axis whose indices are the rows that a part is fetched by, or -1 where runs are better.

    A run costs its descriptor. Its row costs the bytes that are not wanted: the rule is that both
    the runs and what lies between them are short. Rows are those of the first axis that has more
    than one of them, or else of the next on which they are short.
    """
    run, outer = runs(parts, tensors)
    shape, offered = parts.boxes.shape, parts.offered.shape
    itemsize = tensors.itemsize[parts.boxes.tensor]
    contiguous = contiguous_strides(offered, itemsize)
    left = every((parts.strides_bytes == contiguous) | (offered == 1))
    left &= (outer > 0) & (run < SHORT_RUN_BYTES)
    found = np.full(len(run), -1, np.int64)
    row, wanted = volumes(offered) * itemsize, volumes(shape) * itemsize
    for axis in range(tensors.axes):
        row, wanted = row // offered[:, axis], wanted // shape[:, axis]
        here = left & (axis < outer) & (shape[:, axis] > 1)
        here &= (row - wanted < SHORT_RUN_BYTES) & (row <= scratch)
        found[here] = axis
        left &= ~here
    return found


def in_batches(
    parts: Parts,
    tensors: TensorTable,
    step: Column,
    axis: Column,
    scratch: int,
) -> dict[int, list[PackedBatch]]:
    """Parts by step, in batches of pieces that fit the scratch area.

    Args:
        parts: [n] of them, all to be packed.
        tensors: that they are of.
        step: [n] of each part, ascending.
        axis: [n] from `packed_axis`.
        scratch: bytes of the scratch area.
    """
    if not len(step):
        return {}
    boxes, offered, strides = parts.boxes, parts.offered, parts.target_strides
    each, every_axis = np.arange(len(step)), np.arange(tensors.axes)
    outside = every_axis < axis[:, None]
    rows_of = np.where(every_axis > axis[:, None], offered.shape, 1)
    row_bytes = volumes(rows_of) * tensors.itemsize[boxes.tensor]
    # What is before the axis is walked index by index; of the axis, as many rows as fit.
    most = scratch // row_bytes
    count = boxes.shape[each, axis]
    cuts = -(-count // most)
    walked = np.where(outside, boxes.shape, 1)
    pieces = volumes(walked) * cuts
    of = np.repeat(each, pieces)
    begin = np.where(every_axis > axis[:, None], 0, boxes.start - offered.start)
    remote = parts.offered_address + summed(begin * parts.strides_bytes).astype(np.uint64)
    remote, target = remote[of], parts.target[of]
    taken = np.minimum(most, count)[of]
    # Most parts are one piece, and nothing to walk.
    many = np.flatnonzero(pieces[of] > 1)
    part = of[many]
    number = np.arange(len(of))[many] - (pieces.cumsum() - pieces)[part]
    left, cut = np.divmod(number, cuts[part])
    row = cut * most[part]
    taken[many] = np.minimum(most[part], count[part] - row)
    remote[many] += (row * row_bytes[part]).astype(np.uint64)
    target[many] += row * strides[part, axis[part]]
    for outer in reversed(range(tensors.axes - 1)):
        left, index = np.divmod(left, walked[part, outer])
        remote[many] += (index * parts.strides_bytes[part, outer]).astype(np.uint64)
        target[many] += index * strides[part, outer]
    nbytes = taken * row_bytes[of]
    forms, form = _forms(parts, tensors, axis, of, taken)
    steps = step[of]
    begins, offsets = _batches(steps, nbytes, scratch)
    table = PackedTable(
        source=parts.source[of],
        remote_device=parts.device[of],
        remote_address=remote,
        nbytes=nbytes,
        scratch_offset=offsets,
        target=target,
        form=form,
        forms=forms,
    )
    found: dict[int, list[PackedBatch]] = {}
    ends = [*begins[1:], len(of)]
    for at, begin_of, end in zip(steps[begins].tolist(), begins, ends, strict=True):
        found.setdefault(at, []).append(PackedBatch(table, slice(begin_of, end)))
    return found


def aligned(nbytes: Column) -> Column:
    """[n] sizes rounded up to where the next piece may begin."""
    rounded: Column = -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return rounded


def _batches(steps: Column, sizes: Column, scratch: int) -> tuple[list[int], Column]:
    """Where batches begin that fit the scratch area, each of one step; and each piece's offset."""
    rounded = aligned(sizes)
    before = rounded.cumsum() - rounded
    end = before + sizes
    step_ends = np.append(np.flatnonzero(steps[1:] != steps[:-1]) + 1, len(steps)).tolist()
    begins: list[int] = []
    begin = 0
    for step_end in step_ends:
        while begin < step_end:
            begins.append(begin)
            fitting = np.searchsorted(end, before[begin] + scratch, side="right")
            begin = min(int(fitting), step_end)
    counts = np.diff([*begins, len(steps)])
    return begins, before - np.repeat(before[begins], counts)


def _forms(
    parts: Parts, tensors: TensorTable, axis: Column, of: Column, taken: Column
) -> tuple[list[PieceForm], Column]:
    """The different forms of pieces, and which of them each piece has."""
    codes = {dtype: code for code, dtype in enumerate(dict.fromkeys(tensors.dtypes))}
    dtypes = list(codes)
    code = np.fromiter((codes[each] for each in tensors.dtypes), np.int64, len(tensors.dtypes))
    within = np.arange(tensors.axes) > axis[:, None]
    start = parts.boxes.start - parts.offered.start
    boxes = (np.where(within, each, 0) for each in (parts.offered.shape, start, parts.boxes.shape))
    tables = [*boxes, parts.target_strides]
    flat = [table[:, column] for table in tables for column in range(tensors.axes)]
    of_parts, kind = _different([code[parts.boxes.tensor], axis, *flat])
    pairs, form = _different([kind[of], taken])
    forms: list[PieceForm] = []
    for number, count in pairs.tolist():
        which, first, *numbers = of_parts[number].tolist()
        offered, begin, wanted, strides = (
            numbers[column * tensors.axes : (column + 1) * tensors.axes] for column in range(4)
        )
        inner = list(zip(begin, wanted, strict=True))[first + 1 :]
        forms.append(
            PieceForm(
                dtype=dtypes[which],
                shape=(count, *offered[first + 1 :]),
                wanted=(slice(0, count), *(slice(a, a + size) for a, size in inner)),
                target_strides=tuple(strides[first:]),
            )
        )
    return forms, form


def _different(columns: Sequence[Column]) -> tuple[Column, Column]:
    """The different rows of [n] columns, as a table, and the number of each row among them."""
    draw = np.random.default_rng(0)
    marks = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        marks += column * np.int64(int(draw.integers(1 << 62)) | 1)
    _, first, number = np.unique(marks, return_index=True, return_inverse=True)
    if all((column[first][number] == column).all() for column in columns):
        return np.column_stack([column[first] for column in columns]), number
    # Two different rows have one mark, which next to never happens.
    return np.unique(np.column_stack(columns), axis=0, return_inverse=True)
