"""A plan as plain data: what is read from whom, and where it goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.planning.box_table import Column
from engine_plugins.weights.transport.base import Descriptors

__all__ = [
    "FetchPlan",
    "Landing",
    "PackedBatch",
    "PackedPiece",
    "PackedTable",
    "PieceForm",
    "Step",
    "StepRead",
]


class Landing(NamedTuple):
    """A whole HF tensor, at an offset from its step's start."""

    tensor: LogicalTensor
    offset_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRead:
    """Bytes that one source gives straight into place.

    `descriptors` is [n, 3] uint64: offset from the step's start (in a direct step the address in
    live memory), remote address, bytes.
    """

    source: int
    remote_device: int
    descriptors: Descriptors


class PieceForm(NamedTuple):
    """What many packed pieces have in common."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the rows as they are read, in elements."""
    wanted: tuple[slice, ...]
    """What of them is wanted."""
    target_strides: tuple[int, ...]
    """Of what is wanted where it goes, in bytes."""


class PackedPiece(NamedTuple):
    """Rows that are contiguous at the source and land as many short runs.

    They are read whole into the scratch area, and what is wanted of them is spread from there by
    one strided copy.
    """

    source: int
    remote_device: int
    remote_address: int
    nbytes: int
    scratch_offset: int
    target: int
    """Where it goes: bytes from the step's start, or an address in live memory."""
    form: PieceForm


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedTable:
    """Packed pieces as columns, since a plan may have a million of them.

    All are [n] int64 but `remote_address`, which is uint64; `form` is a row of `forms`.
    """

    source: Column
    remote_device: Column
    remote_address: npt.NDArray[np.uint64]
    nbytes: Column
    scratch_offset: Column
    target: Column
    form: Column
    forms: Sequence[PieceForm]

    def reads(self, rows: Column, scratch: int) -> Descriptors:
        """[n, 3] uint64 of some pieces: address in the scratch area, remote address, bytes."""
        found = np.empty((len(rows), 3), np.uint64)
        found[:, 0] = self.scratch_offset[rows] + scratch
        found[:, 1] = self.remote_address[rows]
        found[:, 2] = self.nbytes[rows]
        return found


class PackedBatch(Sequence[PackedPiece]):
    """Some pieces of a table that follow each other, made on demand.

    Attributes:
        table: which has them.
        rows: theirs.
    """

    __slots__ = ("rows", "table")

    def __init__(self, table: PackedTable, rows: slice) -> None:
        self.table = table
        self.rows = rows

    @property
    def nbytes(self) -> int:
        """Of all pieces, as they are read."""
        return int(self.table.nbytes[self.rows].sum())

    def by_peer(self) -> Iterator[tuple[int, int, Column]]:
        """Source, device there, and rows of the table, for each pair of the two."""
        table, rows = self.table, np.arange(self.rows.start, self.rows.stop)
        source, device = table.source[rows], table.remote_device[rows]
        order = np.lexsort((device, source))
        source, device = source[order], device[order]
        changes = np.flatnonzero((source[1:] != source[:-1]) | (device[1:] != device[:-1])) + 1
        firsts = [0, *changes.tolist()] if len(rows) else []
        for first, of_peer in zip(firsts, np.split(rows[order], changes), strict=False):
            yield int(source[first]), int(device[first]), of_peer

    def __len__(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @overload
    def __getitem__(self, index: int) -> PackedPiece: ...

    @overload
    def __getitem__(self, index: slice) -> list[PackedPiece]: ...

    def __getitem__(self, index: int | slice) -> PackedPiece | list[PackedPiece]:
        return list(self)[index]

    def __iter__(self) -> Iterator[PackedPiece]:
        table, rows = self.table, self.rows
        numbers = (table.source, table.remote_device, table.remote_address, table.nbytes)
        columns = (*numbers, table.scratch_offset, table.target)
        forms = (table.forms[form] for form in table.form[rows].tolist())
        each = (column[rows].tolist() for column in columns)
        return map(PackedPiece._make, zip(*each, forms, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedBatch) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The tensors of one engine module: fetched together, installed together."""

    modules: tuple[str, ...]
    tensors: Sequence[LogicalTensor]
    offsets: Column
    """[n] bytes from the step's start to each tensor's first element. It may be less than 0: only
    the box that is needed has a place in the receive buffer."""
    strides_bytes: Column
    """[n, axes] of each tensor there, aligned at the right."""
    reach: tuple[int, int]
    """Bytes from the step's start to where views of its whole tensors begin and end: they may
    reach past what is needed."""
    direct: bool
    """Whether what is fetched goes into live parameters instead of the receive buffer."""
    nbytes: int
    """Receive buffer of the step: what is needed of its tensors. None at all for a direct step."""
    bytes_needed: int
    reads: tuple[StepRead, ...]
    packed: tuple[PackedBatch, ...]
    """Batches of pieces; each batch fits the scratch area."""

    @property
    def landings(self) -> list[Landing]:
        """The tensors at their offsets; made on demand, since a model has very many."""
        return list(map(Landing, self.tensors, self.offsets.tolist()))

    @property
    def bytes_to_move(self) -> int:
        """Bytes on the wire for this step; more than needed where whole rows are cheaper."""
        direct = sum(int(read.descriptors[:, 2].sum()) for read in self.reads)
        return direct + sum(batch.nbytes for batch in self.packed)

    @property
    def operations(self) -> int:
        """Descriptors on the wire for this step."""
        return sum(len(read.descriptors) for read in self.reads) + sum(map(len, self.packed))


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchPlan:
    """Every step of one engine rank, in the order of its model."""

    steps: tuple[Step, ...]
    scratch_bytes: int

    @property
    def largest_step_bytes(self) -> int:
        """Receive buffer that the largest module needs."""
        return max((step.nbytes for step in self.steps), default=0)

    @property
    def direct_bytes(self) -> int:
        """Bytes that land in live parameters."""
        return sum(step.bytes_needed for step in self.steps if step.direct)

    @property
    def total_bytes(self) -> int:
        """Receive buffer that holds every step at once."""
        return sum(step.nbytes for step in self.steps)
