"""The plan: which bytes of which trainer process go where in this rank's receive buffer.

A plan is the intersection of two maps. Sources say where boxes of HF tensors lie in the trainers'
memory (manifests); the destination says which HF tensors the engine's loader wants together (one
step per engine module). The result is plain data with addresses relative to the step's start,
computed once and used for every update.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import Interval
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.loader.coverage import EngineStep
from engine_plugins.weights.planning.box_table import (
    Column,
    LiveBox,
    TensorTable,
    contiguous_strides,
    target_table,
    volumes,
)
from engine_plugins.weights.planning.intersection import Parts, intersect, runs
from engine_plugins.weights.planning.logical_tensors import logical_tensors
from engine_plugins.weights.planning.source_choice import Reader, SourceChoice
from engine_plugins.weights.planning.source_table import source_table
from engine_plugins.weights.transport.base import Descriptors

__all__ = [
    "FetchPlan",
    "Landing",
    "PackedPiece",
    "PieceForm",
    "Step",
    "StepRead",
    "Window",
    "build_plan",
    "coalesced",
    "laid_apart",
    "logical_tensors",
    "schedule",
]

ALIGNMENT_BYTES = 64
SHORT_RUN_BYTES = 16 * 1024
"""Below this, rows are fetched as one block and spread locally: a descriptor costs as much as
moving so many bytes (docs/decisions.md, D7 and D27)."""
SCRATCH_SHARE = 256
"""The scratch area may take one byte for so many that a rank receives."""


class Landing(NamedTuple):
    """A whole HF tensor, contiguous, at an offset from its step's start."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The tensors of one engine module: fetched together, installed together."""

    modules: tuple[str, ...]
    tensors: Sequence[LogicalTensor]
    offsets: Column
    """[n] bytes from the step's start, for each of the tensors."""
    direct: bool
    """Whether what is fetched goes into live parameters instead of the receive buffer."""
    nbytes: int
    """Receive buffer of the step: its whole tensors, of which only what is needed is fetched.
    None at all for a direct step."""
    bytes_needed: int
    reads: tuple[StepRead, ...]
    packed: tuple[tuple[PackedPiece, ...], ...]
    """Batches of pieces; each batch fits the scratch area."""

    @property
    def landings(self) -> list[Landing]:
        """The tensors at their offsets; made on demand, since a model has very many."""
        return list(map(Landing, self.tensors, self.offsets.tolist()))

    @property
    def bytes_to_move(self) -> int:
        """Bytes on the wire for this step; more than needed where whole rows are cheaper."""
        direct = sum(int(read.descriptors[:, 2].sum()) for read in self.reads)
        return direct + sum(piece.nbytes for batch in self.packed for piece in batch)

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Where a step lies in the receive buffer, and how many steps must be installed first."""

    offset_bytes: int
    installed_before: int


def schedule(sizes: Sequence[int], capacity: int) -> list[Window]:
    """Place steps in a ring of `capacity` bytes, in order.

    A step may be fetched as soon as the steps whose bytes it overwrites are installed. With a
    capacity of all sizes together nothing waits: that is a staged update.
    """
    windows: list[Window] = []
    position = 0
    wrapped = False
    for size in sizes:
        if not size:
            windows.append(Window(offset_bytes=position, installed_before=0))
            continue
        if position + size > capacity:
            position, wrapped = 0, True
        before = _last_overlap(windows, sizes, position, size) if wrapped else -1
        windows.append(Window(offset_bytes=position, installed_before=before + 1))
        position += size
    return windows


def _last_overlap(windows: list[Window], sizes: Sequence[int], start: int, size: int) -> int:
    for index in range(len(windows) - 1, -1, -1):
        other = windows[index].offset_bytes
        if start < other + sizes[index] and other < start + size:
            return index
    return -1


def coalesced(steps: Sequence[EngineStep], direct: Container[str] = ()) -> list[EngineStep]:
    """Join neighbouring small modules into one step, so that norms do not travel one by one.

    A joined step stays below a quarter of the largest module: several still fit the receive
    buffer, and the next ones are fetched while one is installed. Modules that land directly, by
    name, do not join those that do not.
    """
    sizes = [sum(tensor.nbytes for tensor in tensors) for _, tensors in steps]
    limit = max(sizes, default=0) // 4
    joined: list[EngineStep] = []
    room = 0
    for (modules, tensors), size in zip(steps, sizes, strict=True):
        alike = bool(joined) and (joined[-1][0][0] in direct) == (modules[0] in direct)
        if alike and size <= room:
            joined[-1][0].extend(modules)
            joined[-1][1].extend(tensors)
            room -= size
        else:
            joined.append(([*modules], [*tensors]))
            room = limit - size
    return joined


def build_plan(
    manifests: Sequence[SourceManifest],
    steps: Sequence[tuple[Sequence[str], Sequence[LogicalTensor]]],
    needed: Mapping[str, Sequence[Interval]] | None = None,
    live: Mapping[str, Sequence[LiveBox]] | None = None,
    reader: Reader | None = None,
) -> FetchPlan:
    """Plan the fetch of what a rank needs of its tensors, step by step.

    Args:
        manifests: what the sources offer; equal boxes are replicas and are read evenly.
        steps: engine modules and the HF tensors that fill them, in the engine's order.
        needed: disjoint boxes (start, shape) of a tensor that are fetched; a tensor without an
            entry is fetched whole. The sources must offer all of it either way.
        live: where tensors go that land in live parameters. A step's tensors all do, or none.
        reader: how this rank chooses among replicas; evenly if not told.

    Raises:
        PlanError: a gap or an overlap, or no source that the reader may read; the text names the
            tensor and the boxes.
    """
    ordered = [tensor for _, tensors in steps for tensor in tensors]
    table = TensorTable(ordered)
    sources = source_table(manifests, table)
    live = live or {}
    direct = [bool(tensors) and tensors[0].name in live for _, tensors in steps]
    layout = _Layout(table, [len(tensors) for _, tensors in steps], direct)
    choice = SourceChoice(reader=reader or Reader(), manifests=manifests)
    targets = target_table(table, needed or {}, live, layout.offset)
    parts = intersect(targets, sources, table, choice)
    scratch = _scratch_bytes(layout, parts)
    packed = _packed_rows(parts, table, scratch)
    reads = _reads(parts, table, layout, np.flatnonzero(~packed))
    pieces = _pieces(parts, table, layout, np.flatnonzero(packed), scratch)
    wanted = np.bincount(layout.step[parts.boxes.tensor], parts.nbytes, minlength=len(steps))
    planned = [
        Step(
            modules=tuple(modules),
            tensors=tensors,
            offsets=layout.offset[layout.tensors(number)],
            direct=direct[number],
            nbytes=int(layout.nbytes[number]),
            bytes_needed=int(wanted[number]),
            reads=tuple(reads.get(number, ())),
            packed=tuple(map(tuple, pieces.get(number, ()))),
        )
        for number, (modules, tensors) in enumerate(steps)
    ]
    return FetchPlan(steps=tuple(planned), scratch_bytes=scratch if pieces else 0)


def _scratch_bytes(layout: _Layout, parts: Parts) -> int:
    """Scratch area for short rows: small beside what the rank receives, and never large."""
    room = max(layout.largest // 4, int(parts.nbytes.sum()) // SCRATCH_SHARE)
    return min(4 << 20, room) // ALIGNMENT_BYTES * ALIGNMENT_BYTES


def laid_apart(plan: FetchPlan) -> FetchPlan:
    """The same plan with a place of its own in the scratch area for every packed piece."""
    used = 0
    steps: list[Step] = []
    for step in plan.steps:
        apart: list[PackedPiece] = []
        for piece in (piece for batch in step.packed for piece in batch):
            apart.append(piece._replace(scratch_offset=used))
            used = _aligned(used + piece.nbytes)
        steps.append(replace(step, packed=(tuple(apart),) if apart else ()))
    return FetchPlan(steps=tuple(steps), scratch_bytes=used)


class _Layout:
    """Where each tensor lands.

    Attributes:
        step: [n] of each tensor, by number.
        offset: [n] bytes from the step's start.
        nbytes: [steps] receive buffer of each step.
    """

    def __init__(self, tensors: TensorTable, counts: Sequence[int], direct: Sequence[bool]) -> None:
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        sizes = -(-tensors.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        before = np.concatenate([[0], sizes.cumsum()])
        self.step = np.repeat(np.arange(len(counts)), counts)
        self.offset = before[:-1] - before[self._first[self.step]]
        self.nbytes = before[self._first[1:]] - before[self._first[:-1]]
        self.nbytes[np.array(direct, np.bool_)] = 0
        self.largest = int(self.nbytes.max(initial=0))

    def tensors(self, step: int) -> slice:
        """Numbers of a step's tensors."""
        return slice(int(self._first[step]), int(self._first[step + 1]))


def _reads(
    parts: Parts,
    tensors: TensorTable,
    layout: _Layout,
    rows: Column,
) -> dict[int, list[StepRead]]:
    """Parts that go straight into place, by step: one read for each source and device."""
    step = layout.step[parts.boxes.tensor[rows]]
    source, device = parts.source[rows], parts.device[rows]
    order = np.lexsort((device, source, step))
    keys = np.stack([step, source, device], axis=1)[order]
    table, of_part = _descriptors(parts, tensors, rows[order])
    begins = np.flatnonzero(np.concatenate([[True], (keys[1:] != keys[:-1]).any(axis=1)]))
    cuts = np.searchsorted(of_part, begins[1:])
    reads: dict[int, list[StepRead]] = {}
    for first, rows_of_it in zip(begins.tolist(), np.split(table, cuts), strict=False):
        if len(rows_of_it):
            at, source_of_it, device_of_it = keys[first].tolist()
            read = StepRead(source=source_of_it, remote_device=device_of_it, descriptors=rows_of_it)
            reads.setdefault(at, []).append(read)
    return reads


def _descriptors(parts: Parts, tensors: TensorTable, rows: Column) -> tuple[Descriptors, Column]:
    """[m, 3] rows of (where it goes, remote address, bytes), and their parts.

    A part is walked run by run: runs that follow each other on both sides are one.
    """
    run, outer = runs(parts, tensors)
    boxes, target = parts.boxes[rows], parts.target_strides[rows]
    walked = np.where(np.arange(tensors.axes) < outer[rows, None], boxes.shape, 1)
    counts = walked.prod(axis=1)
    of_part = np.repeat(np.arange(len(rows)), counts)
    left = np.arange(len(of_part)) - np.repeat(counts.cumsum() - counts, counts)
    local = parts.target[rows][of_part]
    skipped = np.zeros(len(of_part), np.int64)
    for axis in reversed(range(tensors.axes)):
        left, index = np.divmod(left, walked[of_part, axis])
        local += index * target[of_part, axis]
        skipped += index * parts.strides_bytes[rows][of_part, axis]
    table = np.empty((len(of_part), 3), dtype=np.uint64)
    table[:, 0] = local
    table[:, 1] = parts.address[rows][of_part] + skipped.astype(np.uint64)
    table[:, 2] = run[rows][of_part]
    return table, of_part


def _packed_rows(parts: Parts, tensors: TensorTable, scratch: int) -> npt.NDArray[np.bool_]:
    """[n] parts whose short runs would cost more than the whole rows that they lie in.

    A run costs its descriptor. Its row costs the bytes that are not wanted: the rule is that both
    the runs and what lies between them are short.
    """
    run, outer = runs(parts, tensors)
    itemsize = tensors.itemsize[parts.boxes.tensor]
    offered = parts.offered.shape
    contiguous = contiguous_strides(offered, itemsize)
    dense = ((parts.strides_bytes == contiguous) | (offered == 1)).all(axis=1)
    every = np.arange(len(run))
    row = _row_elements(offered, tensors, parts, every) * itemsize
    unwanted = row - _row_elements(parts.boxes.shape, tensors, parts, every) * itemsize
    short = np.maximum(run, unwanted) < SHORT_RUN_BYTES
    packed: npt.NDArray[np.bool_] = (outer > 0) & short & dense & (row <= scratch)
    return packed


def _row_elements(shape: Column, tensors: TensorTable, parts: Parts, rows: Column) -> Column:
    """[n] elements of one index on the first own axis of these parts' shapes."""
    first = tensors.axes - np.maximum(tensors.ndim[parts.boxes.tensor[rows]], 1)
    elements: Column = volumes(shape) // shape[np.arange(len(shape)), first]
    return elements


def _pieces(
    parts: Parts,
    tensors: TensorTable,
    layout: _Layout,
    rows: Column,
    scratch: int,
) -> dict[int, list[list[PackedPiece]]]:
    """Packed parts by step, in batches of pieces that fit the scratch area."""
    boxes, offered = parts.boxes[rows], parts.offered[rows]
    each = np.arange(len(rows))
    axis = tensors.axes - np.maximum(tensors.ndim[boxes.tensor], 1)
    row_bytes = _row_elements(offered.shape, tensors, parts, rows) * tensors.itemsize[boxes.tensor]
    most = scratch // row_bytes
    count = boxes.shape[each, axis]
    cuts = -(-count // most)
    of = np.repeat(each, cuts)
    row = (np.arange(len(of)) - np.repeat(cuts.cumsum() - cuts, cuts)) * most[of]
    taken = np.minimum(most[of], count[of] - row)
    skipped = (boxes.start - offered.start)[each, axis][of] + row
    strides = parts.target_strides[rows]
    shape = (offered.shape[of], (boxes.start - offered.start)[of], boxes.shape[of], strides[of])
    forms, form = _forms(tensors, boxes.tensor[of], axis[of], taken, shape)
    nbytes = taken * row_bytes[of]
    steps = layout.step[boxes.tensor[of]].tolist()
    begins, offsets = _batches(steps, nbytes.tolist(), scratch)
    columns = (
        parts.source[rows][of].tolist(),
        parts.device[rows][of].tolist(),
        (parts.offered_address[rows][of] + (skipped * row_bytes[of]).astype(np.uint64)).tolist(),
        nbytes.tolist(),
        offsets,
        (parts.target[rows][of] + row * strides[each, axis][of]).tolist(),
        [forms[number] for number in form],
    )
    pieces = list(map(PackedPiece._make, zip(*columns, strict=True)))
    found: dict[int, list[list[PackedPiece]]] = {}
    for begin, end in pairwise([*begins, len(pieces)]):
        found.setdefault(steps[begin], []).append(pieces[begin:end])
    return found


def _batches(
    steps: Sequence[int], sizes: Sequence[int], scratch: int
) -> tuple[list[int], list[int]]:
    """Where batches begin that fit the scratch area, each of one step; and each piece's offset."""
    begins: list[int] = []
    offsets: list[int] = []
    used, last = 0, -1
    for index, (step, size) in enumerate(zip(steps, sizes, strict=True)):
        if step != last or used + size > scratch:
            begins.append(index)
            used, last = 0, step
        offsets.append(used)
        used = _aligned(used + size)
    return begins, offsets


def _forms(
    tensors: TensorTable, number: Column, axis: Column, taken: Column, shape: Sequence[Column]
) -> tuple[list[PieceForm], list[int]]:
    """The different forms of pieces, and which of them each piece has."""
    codes = {dtype: code for code, dtype in enumerate({t.dtype for t in tensors.tensors})}
    dtypes = list(codes)
    code = np.fromiter((codes[t.dtype] for t in tensors.tensors), np.int64, len(tensors.tensors))
    table = np.column_stack([code[number], axis, taken, *shape])
    known: dict[bytes, int] = {}
    keys = table.view(f"V{table.shape[1] * table.itemsize}")[:, 0].tolist()
    form = [known.setdefault(key, len(known)) for key in keys]
    forms: list[PieceForm] = []
    for kind, first, count, *numbers in (np.frombuffer(key, np.int64).tolist() for key in known):
        axes = range(first, tensors.axes)
        offered, start, wanted, strides = (
            [numbers[column * tensors.axes + a] for a in axes] for column in range(4)
        )
        inner = zip(start[1:], wanted[1:], strict=True)
        forms.append(
            PieceForm(
                dtype=dtypes[kind],
                shape=(count, *offered[1:]),
                wanted=(slice(0, count), *(slice(a, a + size) for a, size in inner)),
                target_strides=tuple(strides),
            )
        )
    return forms, form


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
