"""Lists of boxes as layouts of real models give them, at small sizes."""

from __future__ import annotations

from engine_kernels import StridedBox

__all__ = ["BOXES", "ELEMENTS"]

ELEMENTS = 40_000
"""Room for all of them on either side."""


def row_parallel(hidden: int, ranks: int, rank: int) -> list[StridedBox]:
    """A rank's columns of a matrix [96, hidden]."""
    columns = hidden // ranks
    return [
        StridedBox(offset=rank * columns, rows=96, columns=columns, pitch=hidden, packed_offset=0)
    ]


def query_key_value(hidden: int, groups: int, queries: int, head: int) -> list[StridedBox]:
    """Megatron's rows, by group queries, one key, one value, as three matrices in a row."""
    group = (queries + 2) * head * hidden
    boxes, place = [], 0
    for first, heads in ((0, queries), (queries, 1), (queries + 1, 1)):
        columns = heads * head * hidden
        boxes.append(
            StridedBox(
                offset=first * head * hidden,
                rows=groups,
                columns=columns,
                pitch=group,
                packed_offset=place,
            )
        )
        place += groups * columns
    return boxes


def gate_up(hidden: int, inner: int, ranks: int) -> list[StridedBox]:
    """Each rank's gate and up rows next to each other, as all gates and then all ups."""
    share = inner // ranks * hidden
    return [
        StridedBox(
            offset=half * share,
            rows=ranks,
            columns=share,
            pitch=2 * share,
            packed_offset=half * ranks * share,
        )
        for half in (0, 1)
    ]


BOXES = {
    "row parallel": row_parallel(256, 4, 3),
    "row parallel, odd": row_parallel(273, 3, 1),
    "query, key, value": query_key_value(32, 3, 4, 16),
    "gate, up": gate_up(48, 32, 4),
    "one run": [StridedBox(offset=5, rows=1, columns=30_001, pitch=0, packed_offset=9)],
    "many sizes": [
        StridedBox(offset=0, rows=1, columns=1, pitch=1, packed_offset=7),
        StridedBox(offset=8, rows=63, columns=8, pitch=24, packed_offset=16),
        StridedBox(offset=4096, rows=2, columns=5000, pitch=6000, packed_offset=1000),
        StridedBox(offset=0, rows=0, columns=8, pitch=8, packed_offset=0),
    ],
}
