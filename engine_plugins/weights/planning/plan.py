"""The plan: which bytes of which trainer process go where in this rank's receive buffer.

A plan is the intersection of two maps. Sources say where boxes of HF tensors lie in the trainers'
memory (manifests); the destination says which HF tensors the engine's loader wants together (one
step per engine module). The result is plain data with addresses relative to the step's start,
computed once and used for every update.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import Interval
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.loader.coverage import EngineStep
from engine_plugins.weights.planning.box_table import (
    Column,
    LiveBox,
    TensorTable,
    target_table,
    volumes,
)
from engine_plugins.weights.planning.intersection import Parts, intersect, runs
from engine_plugins.weights.planning.packing import (
    ALIGNMENT_BYTES,
    aligned,
    in_batches,
    packed_axis,
)
from engine_plugins.weights.planning.places import Places, places_of
from engine_plugins.weights.planning.plan_data import (
    FetchPlan,
    PackedBatch,
    Step,
    StepRead,
)
from engine_plugins.weights.planning.source_choice import Reader, SourceChoice
from engine_plugins.weights.planning.source_table import source_table
from engine_plugins.weights.transport.base import Descriptors

__all__ = [
    "build_plan",
    "coalesced",
    "laid_apart",
]

SCRATCH_SHARE = 256
"""The scratch area may take one byte for so many that a rank receives."""


def coalesced(
    steps: Sequence[EngineStep],
    direct: Container[str] = (),
    sizes: Mapping[str, int] | None = None,
) -> list[EngineStep]:
    """Join neighbouring small modules into one step, so that norms do not travel one by one.

    A joined step stays below a quarter of the largest module: several still fit the receive
    buffer, and the next ones are fetched while one is installed. Modules that land directly, by
    name, do not join those that do not.

    Args:
        steps: one for each module.
        direct: modules that land directly.
        sizes: bytes of each tensor's place in the receive buffer, by name; of the whole if None.
    """
    places = {} if sizes is None else sizes
    room_of = [
        sum(places.get(tensor.name, tensor.nbytes) for tensor in tensors) for _, tensors in steps
    ]
    limit = max(room_of, default=0) // 4
    joined: list[EngineStep] = []
    room = 0
    for (modules, tensors), size in zip(steps, room_of, strict=True):
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
    strided: Container[str] | None = None,
) -> FetchPlan:
    """Plan the fetch of what a rank needs of its tensors, step by step.

    Args:
        manifests: what the sources offer; equal boxes are replicas and are read evenly.
        steps: engine modules and the HF tensors that fill them, in the engine's order.
        needed: disjoint boxes (start, shape) of a tensor that are fetched; a tensor without an
            entry is fetched whole. The sources must offer all of it either way.
        live: where tensors go that land in live parameters. A step's tensors all do, or none.
        reader: how this rank chooses among replicas; evenly if not told.
        strided: see `places_of`: what of a tensor has a place in the receive buffer.

    Raises:
        PlanError: a gap or an overlap, or no source that the reader may read; the text names the
            tensor and the boxes.
    """
    ordered = [tensor for _, tensors in steps for tensor in tensors]
    table = TensorTable(ordered)
    sources = source_table(manifests, table)
    live = live or {}
    direct = [bool(tensors) and tensors[0].name in live for _, tensors in steps]
    places = places_of(table, needed or {}, strided)
    layout = _Layout(places, [len(tensors) for _, tensors in steps], direct)
    choice = SourceChoice(reader=reader or Reader(), manifests=manifests)
    targets = target_table(table, needed or {}, live, layout.offset, places.strides_bytes)
    parts = intersect(targets, sources, table, choice)
    scratch = _scratch_bytes(layout, parts)
    axis = packed_axis(parts, table, scratch)
    reads = _reads(parts, np.flatnonzero(axis < 0), table, layout)
    rows = np.flatnonzero(axis >= 0)
    pieces = in_batches(
        parts[rows], table, layout.step[parts.boxes.tensor[rows]], axis[rows], scratch
    )
    wanted = np.bincount(layout.step[parts.boxes.tensor], parts.nbytes, minlength=len(steps))
    planned = [
        Step(
            modules=tuple(modules),
            tensors=tensors,
            offsets=layout.offset[layout.tensors(number)],
            strides_bytes=places.strides_bytes[layout.tensors(number)],
            reach=layout.reach(number, places.span),
            direct=direct[number],
            nbytes=int(layout.nbytes[number]),
            bytes_needed=int(wanted[number]),
            reads=tuple(reads.get(number, ())),
            packed=tuple(pieces.get(number, ())),
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
    table = next((step.packed[0].table for step in plan.steps if step.packed), None)
    if table is None:
        return plan
    ends = aligned(table.nbytes).cumsum()
    apart = replace(table, scratch_offset=ends - aligned(table.nbytes))
    steps = [
        replace(step, packed=(PackedBatch(apart, _all_rows(step)),) if step.packed else ())
        for step in plan.steps
    ]
    return FetchPlan(steps=tuple(steps), scratch_bytes=int(ends[-1]))


def _all_rows(step: Step) -> slice:
    return slice(step.packed[0].rows.start, step.packed[-1].rows.stop)


class _Layout:
    """Where each tensor lands.

    Attributes:
        step: [n] of each tensor, by number.
        offset: [n] bytes from the step's start.
        nbytes: [steps] receive buffer of each step.
    """

    def __init__(self, places: Places, counts: Sequence[int], direct: Sequence[bool]) -> None:
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        sizes = -(-places.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        before = np.concatenate([[0], sizes.cumsum()])
        self.step = np.repeat(np.arange(len(counts)), counts)
        self.offset = before[:-1] - before[self._first[self.step]] + places.origin
        self.nbytes = before[self._first[1:]] - before[self._first[:-1]]
        self.nbytes[np.array(direct, np.bool_)] = 0
        self.largest = int(self.nbytes.max(initial=0))

    def reach(self, step: int, span: Column) -> tuple[int, int]:
        """Bytes from a step's start to where views of whole tensors begin and end."""
        own = self.tensors(step)
        first = int(self.offset[own].min(initial=0))
        return first, int((self.offset[own] + span[own]).max(initial=0))

    def tensors(self, step: int) -> slice:
        """Numbers of a step's tensors."""
        return slice(int(self._first[step]), int(self._first[step + 1]))


def _reads(
    parts: Parts, rows: Column, tensors: TensorTable, layout: _Layout
) -> dict[int, list[StepRead]]:
    """Some parts that go straight into place, by step: one read for each source and device."""
    columns = (layout.step[parts.boxes.tensor], parts.source, parts.device)
    keys = [column[rows] for column in columns]
    order = np.lexsort(keys[::-1])
    keys = [key[order] for key in keys]
    table, counts = _descriptors(parts, rows[order], tensors)
    changes = np.ones(len(rows), np.bool_)
    changes[1:] = False
    for key in keys:
        changes[1:] |= key[1:] != key[:-1]
    begins = np.flatnonzero(changes)
    cuts = np.concatenate([[0], counts.cumsum()])[np.append(begins, len(rows))]
    reads: dict[int, list[StepRead]] = {}
    firsts = zip(*(key[begins].tolist() for key in keys), strict=True)
    for (at, source, device), (begin, end) in zip(firsts, pairwise(cuts.tolist()), strict=True):
        read = StepRead(source=source, remote_device=device, descriptors=table[begin:end])
        reads.setdefault(at, []).append(read)
    return reads


def _descriptors(parts: Parts, rows: Column, tensors: TensorTable) -> tuple[Descriptors, Column]:
    """[m, 3] rows of (where it goes, remote address, bytes) of some parts, and how many each has.

    A part is walked run by run: runs that follow each other on both sides are one.
    """
    run, outer = runs(parts, tensors)
    walked = np.where(np.arange(tensors.axes) < outer[:, None], parts.boxes.shape, 1)
    counts = volumes(walked)[rows]
    part = np.repeat(rows, counts)
    table = np.empty((len(part), 3), dtype=np.uint64)
    for column, values in enumerate((parts.target, parts.address, run)):
        table[:, column] = values[part]
    # Of most parts there is one run, and nothing to walk.
    many = np.flatnonzero(outer[part])
    part = part[many]
    left = (np.arange(len(table)) - np.repeat(counts.cumsum() - counts, counts))[many]
    for axis in reversed(range(int(outer.max(initial=0)))):
        left, index = np.divmod(left, walked[part, axis])
        table[many, 0] += (index * parts.target_strides[part, axis]).astype(np.uint64)
        table[many, 1] += (index * parts.strides_bytes[part, axis]).astype(np.uint64)
    return table, counts
