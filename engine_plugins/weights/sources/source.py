"""What one trainer process offers: the owner of its memory, registrations and manifest.

The wires keep no reference to what they register, so a forgotten tensor is a peer that reads
freed memory (or dies of it, over TCP). `WeightSource` holds every storage that it has
registered until it has taken the registration back.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from types import TracebackType
from typing import Literal, Self, cast

import torch

from engine_plugins.errors import SourceError, TransportError
from engine_plugins.weights.boxes.dtypes import dtype_name
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.contract.manifest import (
    FORMAT,
    BoxColumns,
    RegionColumns,
    SourceManifest,
    TensorColumns,
    encode_manifest,
    packed,
)
from engine_plugins.weights.contract.manifest_checks import check_manifest
from engine_plugins.weights.contract.version_word import CLOSED, VersionWord, new_word
from engine_plugins.weights.hardware.machine import machine_id
from engine_plugins.weights.hardware.queued_work import finish_queued_work
from engine_plugins.weights.memory.source_memory import (
    Region,
    copy_memory,
    is_readable,
    regions_of,
    storage_key,
    strides_bytes,
    warn_of_expandable_segments,
)
from engine_plugins.weights.sources.remembered import KnownBoxes, layout_of
from engine_plugins.weights.transport.base import Transport

__all__ = ["WeightSource"]

logger = logging.getLogger(__name__)

Boxes = Sequence[SourceBox] | Callable[[], Sequence[SourceBox]]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Placed:
    """A box and the memory that peers read for it: the trainer's own, or a copy of ours."""

    box: SourceBox
    memory: torch.Tensor

    @property
    def is_copy(self) -> bool:
        return self.memory is not self.box.data

    def layout(self) -> tuple[object, ...]:
        """Everything a manifest says of this box; it moved when this differs."""
        box, memory = self.box, self.memory
        storage = memory.untyped_storage()
        # Which storage it is, too: another one may lie where one was freed whose registration
        # still stands. One that was emptied and filled again looks the same: `release` is for it.
        place = (*storage_key(memory), storage._cdata, storage.nbytes(), memory.data_ptr())
        return (box.name, box.global_shape, box.start, memory.dtype, strides_bytes(memory), place)


class WeightSource:
    """Owns what one trainer process offers to engines.

    Whole storages are registered, one region each, never single tensors: two boxes of one
    storage share its region, and a peer can read all of a storage of which it is told a part. On
    CUDA the storages of one allocator segment are one region, what lies between them included,
    because registration costs by the region.
    A box whose last axis is not contiguous is offered as a contiguous copy, which `refresh`
    brings up to date; every other box is the trainer's live memory. Beside them a version word is
    registered (`version_word.py`).

    Args:
        boxes: what to offer, or a function that says so anew. With a function, `refresh`
            sees tensors that were replaced; with a sequence it sees only those whose `.data`
            was replaced under the same tensor object.
        transport: where the memory is registered; it stays the caller's to close.
        source: who speaks, for people; names host and pid when empty.
        global_rank: in the trainer's job, where there is one.
        model: facts of the HF config (see `model_facts`).
        partial: whether what is not offered stays as engines have it.

    Raises:
        SourceError: a tensor that has no plain memory (meta, sparse, DTensor), lies on a device
            that no transport reaches, has an unsupported dtype, or contradicts its namesake.
        TransportError: registration failed; nothing stays registered.
    """

    def __init__(
        self,
        boxes: Boxes,
        transport: Transport,
        *,
        source: str = "",
        global_rank: int | None = None,
        model: Mapping[str, str | int | bool] | None = None,
        partial: bool = False,
    ) -> None:
        self._partial = partial
        self._describe = boxes if callable(boxes) else lambda: boxes
        self._transport = transport
        self._source = source or f"trainer ({socket.gethostname()}, pid {os.getpid()})"
        self._global_rank = global_rank
        self._model = dict(model or {})
        self._placed: list[_Placed] = []
        self._copies: list[_Placed] = []
        self._boxes: Sequence[SourceBox] = ()
        self._lie: list[tuple[object, ...]] = []
        """How the memory of each of the boxes lay; of boxes that say themselves, nothing."""
        self._regions: dict[_RegionKey, Region] = {}
        self._word: VersionWord | None = None
        self._layout: list[tuple[object, ...]] | None = None
        self._manifest: SourceManifest | None = None
        self._closed = False
        try:
            self._word = VersionWord(transport)
            self._word.set(new_word())
            self.refresh()
        except BaseException:  # an interrupt too must leave nothing registered
            self.close()
            raise

    @property
    def manifest(self) -> SourceManifest:
        """The offer as it stands since the last `refresh`."""
        if self._manifest is None:
            raise SourceError(
                "this source offers nothing: it is closed, or its last refresh failed",
                remedy="call refresh(), or build a new source",
            )
        return self._manifest

    @property
    def manifest_bytes(self) -> bytes:
        """The offer in the form that engines take."""
        return encode_manifest(self.manifest)

    @property
    def nbytes(self) -> int:
        """Bytes of all boxes offered; replicas count as often as they are offered."""
        return sum(placed.memory.nbytes for placed in self._placed)

    @property
    def copied_bytes(self) -> int:
        """Bytes held twice, because peers cannot read them in the trainer's own layout."""
        copies = (placed for placed in self._placed if placed.is_copy or placed.box.made)
        return sum(placed.memory.nbytes for placed in copies)

    def refresh(self) -> bool:
        """Bring copies up to date and follow tensors that moved; call before every update.

        Waits for the work queued on the GPUs concerned, so that what peers read afterwards is
        what the trainer has computed. No peer may be reading meanwhile.

        Returns:
            Whether the manifest changed, and engines must be told anew.

        Raises:
            SourceError: closed, or as for the constructor.
            TransportError: registration failed; the next refresh tries again.
        """
        if self._closed or self._word is None:
            raise SourceError("this source is closed", remedy="build a new source")
        boxes = self._describe()
        finish_queued_work(box.data for box in boxes)  # before a copy reads any of it
        known = self._manifest is not None and self._unmoved(boxes)
        placed = self._placed if known else self._place(boxes)
        layout = self._layout if known else [entry.layout() for entry in placed]
        moved = layout != self._layout
        if moved:
            # Registrations go before their storages do, and a failure on the way leaves a
            # source that offers nothing instead of a manifest that lies.
            self._layout = self._manifest = None
            self._register(regions_of(entry.memory for entry in placed))
        if not known:
            self._remember(boxes)
            self._copies = [entry for entry in placed if entry.is_copy]
        with torch.no_grad():
            for entry in self._copies:
                entry.memory.copy_(entry.box.data)
        finish_queued_work(entry.memory for entry in self._copies)
        self._placed = placed
        if moved:
            self._manifest = self._build(self._word)
            self._layout = layout
        return moved

    def offer(self, word: int) -> None:
        """Let engines read that were told this number, and no others: see `VersionWord`.

        Raises:
            SourceError: closed.
        """
        if self._word is None:
            raise SourceError("this source is closed", remedy="build a new source")
        self._word.set(word)

    def revoke(self) -> None:
        """Let no engine take what it reads for whole, from now on, until the next `offer`.

        Comes before the first write to memory that may still be read. Never raises.
        """
        if self._word is not None:
            self._word.set(CLOSED)

    def release(self) -> None:
        """Take the registrations back and let go of the memory, copies too.

        The next refresh registers anew. No engine may be reading.
        """
        for key, region in list(self._regions.items()):
            try:
                self._transport.deregister(region.address)
            except TransportError:
                logger.warning("region at %#x stays registered", region.address, exc_info=True)
            del self._regions[key]
        self._placed, self._copies, self._boxes, self._lie = [], [], (), []
        self._layout = self._manifest = None

    def close(self, *, agent_closed: bool = False) -> None:
        """Take every registration back and let go of the tensors. Repeating it does nothing.

        Args:
            agent_closed: the transport has been closed, and every registration with it.
        """
        self._closed = True
        self.revoke()
        if agent_closed:
            self._regions.clear()
        self.release()
        word, self._word = self._word, None
        if word is not None:
            try:
                word.close(agent_closed=agent_closed)
            except TransportError:
                logger.warning("a version word stays registered", exc_info=True)
        self._describe = list

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _unmoved(self, boxes: Sequence[SourceBox]) -> bool:
        """Whether boxes are those of the last refresh, and lie as they did then."""
        if isinstance(boxes, KnownBoxes):
            return boxes is self._boxes
        return (
            len(boxes) == len(self._boxes)
            and all(map(is_, boxes, self._boxes))
            and all(layout_of(box.data) == lay for box, lay in zip(boxes, self._lie, strict=True))
        )

    def _remember(self, boxes: Sequence[SourceBox]) -> None:
        says_itself = isinstance(boxes, KnownBoxes)
        self._boxes = boxes if says_itself else list(boxes)
        self._lie = [] if says_itself else [layout_of(box.data) for box in boxes]

    def _place(self, boxes: Sequence[SourceBox]) -> list[_Placed]:
        """Give every box that has elements its memory, reusing copies made before."""
        before = self._placed
        placed: list[_Placed] = []
        for box in boxes:
            memory = box.data
            if not is_readable(box.name, memory):
                mine = before[len(placed)] if len(placed) < len(before) else None
                if mine is not None and mine.is_copy and _fits(mine.memory, box.data):
                    memory = mine.memory
                else:
                    memory = copy_memory(memory)
            placed.append(_Placed(box=box, memory=memory))
        return placed

    def _register(self, regions: Sequence[Region]) -> None:
        """Register exactly `regions`."""
        wanted = {_region_key(region): region for region in regions}
        for key in [key for key in self._regions if key not in wanted]:
            self._transport.deregister(self._regions[key].address)
            del self._regions[key]
        warn_of_expandable_segments(regions)
        for key, region in wanted.items():
            if key not in self._regions:
                self._transport.register(region.address, region.nbytes, region.device)
            self._regions[key] = region

    def _build(self, word: VersionWord) -> SourceManifest:
        metadata = self._transport.metadata()
        regions = sorted(self._regions.values(), key=lambda region: region.order)
        tensors = _logical_tensors([entry.box for entry in self._placed])
        axes = max((len(shape) for _, shape in tensors.values()), default=0) or 1
        manifest = SourceManifest(
            format=FORMAT,
            source=self._source,
            transport=cast(Literal["nixl", "in_memory"], self._transport.kind),
            agent=self._transport.agent,
            agent_metadata=metadata,
            agent_metadata_sha256=hashlib.sha256(metadata).hexdigest(),
            model=self._model,
            version_word=word.address,
            axes=axes,
            tensors=TensorColumns(
                names=list(tensors),
                dtypes=[dtype for dtype, _ in tensors.values()],
                ndims=packed(len(shape) for _, shape in tensors.values()),
                shapes=_table((shape for _, shape in tensors.values()), axes, fill=1),
            ),
            regions=RegionColumns(
                addresses=packed(region.address for region in regions),
                nbytes=packed(region.nbytes for region in regions),
                devices=packed(region.device for region in regions),
            ),
            boxes=_box_columns(self._placed, list(tensors), regions, axes),
            host=machine_id(),
            global_rank=self._global_rank,
            partial=self._partial,
        )
        entries = len(tensors) + len(regions) + len(self._placed)
        if entries:
            check_manifest(manifest, max_entries=entries)
        return manifest


_RegionKey = tuple[int, int, int, frozenset[int]]


def _region_key(region: Region) -> _RegionKey:
    """What must be the same for a registration to stand: the range, and the storages in it."""
    storages = frozenset(storage._cdata for storage in region.storages.values())
    return (region.device, region.address, region.nbytes, storages)


def _fits(copy: torch.Tensor, data: torch.Tensor) -> bool:
    return (copy.shape, copy.dtype, copy.device) == (data.shape, data.dtype, data.device)


def _logical_tensors(boxes: Sequence[SourceBox]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name of the dtype and whole shape of every tensor that boxes are of."""
    facts: dict[str, tuple[str, tuple[int, ...]]] = {}
    for box in boxes:
        fact = (dtype_name(box.data.dtype), box.global_shape)
        if facts.setdefault(box.name, fact) != fact:
            raise SourceError(
                f"{box.name} is offered as {facts[box.name]} and as {fact}",
                remedy="every shard of a tensor must agree on its dtype and whole shape",
            )
    return facts


def _box_columns(
    placed: Sequence[_Placed], names: Sequence[str], regions: Sequence[Region], axes: int
) -> BoxColumns:
    """One row per box; boxes without elements have no memory, and no row."""
    full = [entry for entry in placed if entry.memory.numel()]
    rows = {key: row for row, region in enumerate(regions) for key in region.storages}
    row_of = {name: row for row, name in enumerate(names)}
    held = [rows[storage_key(entry.memory)] for entry in full]
    return BoxColumns(
        tensors=packed(row_of[entry.box.name] for entry in full),
        starts=_table((entry.box.start for entry in full), axes, fill=0),
        shapes=_table((entry.box.shape for entry in full), axes, fill=1),
        regions=packed(held),
        offsets_bytes=packed(
            entry.memory.data_ptr() - regions[row].address
            for entry, row in zip(full, held, strict=True)
        ),
        strides_bytes=_table((strides_bytes(entry.memory) for entry in full), axes, fill=0),
    )


def _table(rows: Iterable[tuple[int, ...]], axes: int, *, fill: int) -> bytes:
    """Rows of at most `axes` numbers, aligned at the right."""
    front = [(fill,) * missing for missing in range(axes + 1)]
    return packed(chain.from_iterable((*front[axes - len(row)], *row) for row in rows))
