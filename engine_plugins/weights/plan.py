"""The plan: which bytes of which trainer process go where in this rank's receive buffer.

A plan is the intersection of two maps. Sources say where boxes of HF tensors lie in the trainers'
memory (manifests); the destination says which HF tensors the engine's loader wants together (one
step per engine module). The result is plain data with addresses relative to the step's start,
computed once and used for every update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from operator import mul

import numpy as np

from engine_plugins.errors import PlanError
from engine_plugins.weights.coverage import EngineStep
from engine_plugins.weights.dtypes import dtype_named
from engine_plugins.weights.loader_trace import LogicalTensor
from engine_plugins.weights.manifest import SourceManifest
from engine_plugins.weights.placement import Interval, check_exact_coverage
from engine_plugins.weights.transport.base import Descriptors

__all__ = [
    "FetchPlan",
    "Landing",
    "PackedPiece",
    "Step",
    "StepRead",
    "Window",
    "build_plan",
    "coalesced",
    "logical_tensors",
    "schedule",
]

ALIGNMENT_BYTES = 64
SHORT_RUN_BYTES = 16 * 1024
"""Below this, rows are fetched as one block and spread locally: a descriptor costs 4-8 us, in
which a copy within memory moves more bytes than that (docs/decisions.md, D7)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Landing:
    """A whole HF tensor, contiguous, at an offset from its step's start."""

    tensor: LogicalTensor
    offset_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRead:
    """Bytes that one source gives straight into place.

    `descriptors` is [n, 3] uint64: offset from the step's start, remote address, bytes.
    """

    source: int
    remote_device: int
    descriptors: Descriptors


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedPiece:
    """Rows that are contiguous at the source and land as many short runs.

    They are read whole into the scratch area, and what is wanted of them is spread from there by
    one strided copy.
    """

    source: int
    remote_device: int
    remote_address: int
    nbytes: int
    scratch_offset: int
    shape: tuple[int, ...]
    """Of the rows as they are read, in elements."""
    wanted: tuple[slice, ...]
    """What of them is wanted."""
    landing: int
    """Row in the step's landings."""
    slices: tuple[slice, ...]
    """Where that lies in the landing's tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The tensors of one engine module: fetched together, installed together."""

    modules: tuple[str, ...]
    landings: tuple[Landing, ...]
    nbytes: int
    """Receive buffer of the step: its whole tensors, of which only what is needed is fetched."""
    bytes_needed: int
    reads: tuple[StepRead, ...]
    packed: tuple[tuple[PackedPiece, ...], ...]
    """Batches of pieces; each batch fits the scratch area."""

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
        return max(step.nbytes for step in self.steps)

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


def logical_tensors(manifests: Sequence[SourceManifest]) -> list[LogicalTensor]:
    """The whole tensors that the sources speak of, in their order, each once.

    Raises:
        PlanError: two sources give one tensor another shape or dtype.
    """
    known: dict[str, tuple[LogicalTensor, str]] = {}
    for manifest in manifests:
        columns = manifest.tensors
        for name, dtype, shape in zip(columns.names, columns.dtypes, columns.shapes, strict=True):
            tensor = LogicalTensor(name=name, shape=tuple(shape), dtype=dtype_named(dtype))
            first, source = known.setdefault(name, (tensor, manifest.source))
            if first != tensor:
                raise PlanError(
                    f"{name}: {source} says {first.shape} {first.dtype}, {manifest.source} says "
                    f"{tensor.shape} {tensor.dtype}",
                    remedy="every rank must publish the same model, sharded alike",
                )
    return [tensor for tensor, _ in known.values()]


def coalesced(steps: Sequence[EngineStep]) -> list[EngineStep]:
    """Join neighbouring small modules into one step, so that norms do not travel one by one.

    A joined step stays below a quarter of the largest module: several still fit the receive
    buffer, and the next ones are fetched while one is installed.
    """
    sizes = [sum(tensor.nbytes for tensor in tensors) for _, tensors in steps]
    limit = max(sizes, default=0) // 4
    joined: list[EngineStep] = []
    room = 0
    for (modules, tensors), size in zip(steps, sizes, strict=True):
        if joined and size <= room:
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
) -> FetchPlan:
    """Plan the fetch of what a rank needs of its tensors, step by step.

    Args:
        manifests: what the sources offer; equal boxes are replicas and are read evenly.
        steps: engine modules and the HF tensors that fill them, in the engine's order.
        needed: disjoint boxes (start, shape) of a tensor that are fetched; a tensor without an
            entry is fetched whole. The sources must offer all of it either way.

    Raises:
        PlanError: a gap or an overlap; the text names the tensor and the boxes.
    """
    offers = _Offers(manifests)
    sizes = [sum(_aligned(tensor.nbytes) for tensor in tensors) for _, tensors in steps]
    scratch = min(4 << 20, max(sizes, default=0) // 4 // ALIGNMENT_BYTES * ALIGNMENT_BYTES)
    planned = [
        _plan_step(offers, tuple(modules), tensors, scratch, needed or {})
        for modules, tensors in steps
    ]
    return FetchPlan(steps=tuple(planned), scratch_bytes=scratch)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Offer:
    """One box of one tensor in one source's memory."""

    source: int
    device: int
    address: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]

    def part(self, box: Interval) -> _Offer | None:
        """What of this offer lies in a box, or None."""
        first = tuple(map(max, self.start, box[0]))
        ends = (
            min(start + size, other + other_size)
            for start, size, other, other_size in zip(self.start, self.shape, *box, strict=True)
        )
        shape = tuple(end - begin for begin, end in zip(first, ends, strict=True))
        if not all(size > 0 for size in shape):
            return None
        skipped = sum(
            (begin - start) * stride
            for begin, start, stride in zip(first, self.start, self.strides_bytes, strict=True)
        )
        return replace(self, address=self.address + skipped, start=first, shape=shape)


class _Offers:
    """All offers by tensor name, and how many bytes each source has been given to read."""

    def __init__(self, manifests: Sequence[SourceManifest]) -> None:
        self._by_name: dict[str, list[_Offer]] = {}
        self._load = [0] * len(manifests)
        for source, manifest in enumerate(manifests):
            for tensor, offer in _manifest_offers(source, manifest):
                self._by_name.setdefault(manifest.tensors.names[tensor], []).append(offer)

    def chosen(
        self, tensor: LogicalTensor, needed: Sequence[Interval]
    ) -> Iterator[tuple[_Offer, _Offer]]:
        """Offers and the parts of them that give every needed element once.

        The load is spread over replicas by the bytes that are fetched.
        """
        offers = self._by_name.get(tensor.name, [])
        check_exact_coverage(tensor.name, tensor.shape, [(o.start, o.shape) for o in offers])
        replicas: dict[Interval, list[_Offer]] = {}
        for offer in offers:
            replicas.setdefault((offer.start, offer.shape), []).append(offer)
        for group in replicas.values():
            for box in needed:
                if (part := group[0].part(box)) is not None:
                    offer = self._least_loaded(group, prod(part.shape) * tensor.dtype.itemsize)
                    yield offer, offer.part(box) or part

    def _least_loaded(self, group: list[_Offer], nbytes: int) -> _Offer:
        offer = min(group, key=lambda each: self._load[each.source])
        self._load[offer.source] += nbytes
        return offer


def _manifest_offers(source: int, manifest: SourceManifest) -> Iterator[tuple[int, _Offer]]:
    boxes, regions = manifest.boxes, manifest.regions
    rows = zip(
        boxes.tensors,
        boxes.starts,
        boxes.shapes,
        boxes.regions,
        boxes.offsets_bytes,
        boxes.strides_bytes,
        strict=True,
    )
    for tensor, start, shape, region, offset, strides in rows:
        yield (
            tensor,
            _Offer(
                source=source,
                device=regions.devices[region],
                address=regions.addresses[region] + offset,
                start=tuple(start),
                shape=tuple(shape),
                strides_bytes=tuple(strides),
            ),
        )


def _plan_step(
    offers: _Offers,
    modules: tuple[str, ...],
    tensors: Sequence[LogicalTensor],
    scratch: int,
    needed: Mapping[str, Sequence[Interval]],
) -> Step:
    landings: list[Landing] = []
    rows: dict[tuple[int, int], list[Descriptors]] = {}
    pieces: list[PackedPiece] = []
    offset = bytes_needed = 0
    for tensor in tensors:
        landing = Landing(tensor=tensor, offset_bytes=offset)
        whole = ((0,) * len(tensor.shape), tensor.shape)
        for offer, part in offers.chosen(tensor, needed.get(tensor.name, [whole])):
            bytes_needed += prod(part.shape) * tensor.dtype.itemsize
            packed = _packed_pieces(offer, part, tensor, len(landings), scratch)
            if packed:
                pieces += packed
            else:
                table = _descriptors(part, tensor, offset)
                rows.setdefault((part.source, part.device), []).append(table)
        landings.append(landing)
        offset += _aligned(tensor.nbytes)
    reads = tuple(
        StepRead(source=source, remote_device=device, descriptors=np.concatenate(tables))
        for (source, device), tables in rows.items()
    )
    return Step(
        modules=modules,
        landings=tuple(landings),
        nbytes=offset,
        bytes_needed=bytes_needed,
        reads=reads,
        packed=_batches(pieces, scratch),
    )


def _descriptors(offer: _Offer, tensor: LogicalTensor, offset: int) -> Descriptors:
    """[n, 3] rows of (offset from the step's start, remote address, bytes), runs merged."""
    itemsize = tensor.dtype.itemsize
    target = _contiguous_strides(tensor.shape, itemsize)
    run, outer = _merged_run(offer, target, itemsize)
    local = np.array([offset + sum(map(mul, offer.start, target))], dtype=np.uint64)
    remote = np.array([offer.address], dtype=np.uint64)
    for axis in range(outer):
        steps = np.arange(offer.shape[axis], dtype=np.uint64)
        local = (local[:, None] + steps * np.uint64(target[axis])).ravel()
        remote = (remote[:, None] + steps * np.uint64(offer.strides_bytes[axis])).ravel()
    table = np.empty((len(local), 3), dtype=np.uint64)
    table[:, 0], table[:, 1], table[:, 2] = local, remote, run
    return table


def _merged_run(offer: _Offer, target: Sequence[int], itemsize: int) -> tuple[int, int]:
    """Bytes that are contiguous on both sides, and how many outer axes remain to walk."""
    run = itemsize
    for axis in range(len(offer.shape) - 1, -1, -1):
        same = offer.strides_bytes[axis] == run == target[axis]
        if not same and offer.shape[axis] != 1:
            return run, axis + 1
        run *= offer.shape[axis]
    return run, 0


def _packed_pieces(
    offer: _Offer, part: _Offer, tensor: LogicalTensor, landing: int, scratch: int
) -> list[PackedPiece]:
    """Pieces of whole rows, where short runs of a part would cost more; empty where they do not.

    A run costs its descriptor. Its row costs the bytes that are not wanted: the rule is that both
    the runs and what lies between them are short.
    """
    itemsize = tensor.dtype.itemsize
    run, outer = _merged_run(part, _contiguous_strides(tensor.shape, itemsize), itemsize)
    row_bytes = prod(offer.shape[1:]) * itemsize
    unwanted = row_bytes - prod(part.shape[1:]) * itemsize
    contiguous = offer.strides_bytes == _contiguous_strides(offer.shape, itemsize)
    if outer == 0 or max(run, unwanted) >= SHORT_RUN_BYTES or not contiguous or row_bytes > scratch:
        return []
    per_piece = scratch // row_bytes
    first_row = part.start[0] - offer.start[0]
    return [
        PackedPiece(
            source=offer.source,
            remote_device=offer.device,
            remote_address=offer.address + (first_row + row) * row_bytes,
            nbytes=rows * row_bytes,
            scratch_offset=0,
            shape=(rows, *offer.shape[1:]),
            wanted=(slice(0, rows), *_slices(part, origin=offer.start)[1:]),
            landing=landing,
            slices=(
                slice(part.start[0] + row, part.start[0] + row + rows),
                *_slices(part, origin=(0,) * len(part.start))[1:],
            ),
        )
        for row in range(0, part.shape[0], per_piece)
        if (rows := min(per_piece, part.shape[0] - row))
    ]


def _slices(part: _Offer, origin: Sequence[int]) -> list[slice]:
    """Where a part lies, counted from an origin."""
    return [
        slice(first - zero, first - zero + size)
        for first, zero, size in zip(part.start, origin, part.shape, strict=True)
    ]


def _batches(pieces: Sequence[PackedPiece], scratch: int) -> tuple[tuple[PackedPiece, ...], ...]:
    batches: list[tuple[PackedPiece, ...]] = []
    batch: list[PackedPiece] = []
    used = 0
    for piece in pieces:
        if used + piece.nbytes > scratch and batch:
            batches.append(tuple(batch))
            batch, used = [], 0
        batch.append(replace(piece, scratch_offset=used))
        used = _aligned(used + piece.nbytes)
    if batch:
        batches.append(tuple(batch))
    return tuple(batches)


def _contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape)))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
