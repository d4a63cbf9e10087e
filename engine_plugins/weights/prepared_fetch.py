"""A plan made ready to pull: peers met, memory registered, reads prepared once for many updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from engine_plugins.errors import TransferTimeoutError, TransportError
from engine_plugins.weights.live_memory import LiveMemory
from engine_plugins.weights.manifest import SourceManifest
from engine_plugins.weights.plan import FetchPlan, PackedPiece, Step, Window
from engine_plugins.weights.receive_buffer import ReceiveBuffer
from engine_plugins.weights.transport.base import Descriptors, PreparedTransfer, Transport
from engine_plugins.weights.transport.meeting import Greetings, meet
from engine_plugins.weights.transport.regions import HOST
from engine_plugins.weights.transport.transfers import run_transfers

__all__ = ["PreparedFetch"]

BATCH_BYTES = 256 << 20
"""The most that is fetched in one go; a step that is larger goes alone."""
MOST_DESCRIPTORS = 128
"""Of one transfer: NIXL looks at all that are under way each time it is asked."""
SLOWEST_BYTES_PER_S = 100e6
"""A fetch may take the stall time and, on top, as long as it takes at this rate."""


class PreparedFetch:
    """Reads of every step of a plan, into one arena or straight into live parameters.

    Used by one pull thread at a time.

    Args:
        plan: what to fetch.
        manifests: the sources, as the plan numbers them.
        transport: does the reads.
        staged: whether the arena holds every step at once.
        live: the parameters that direct steps land in; it stays the caller's to close.
        met: whether each source has been read from since its manifest came. It is not again then:
            a source that is stopped would hold the caller, who holds the engine; the pull finds it.

    Raises:
        UnsupportedError: the machine has not the memory to stage.
        TransportError: a peer cannot be met or read.
    """

    def __init__(
        self,
        plan: FetchPlan,
        manifests: Sequence[SourceManifest],
        transport: Transport,
        *,
        staged: bool,
        live: LiveMemory | None = None,
        met: bool = False,
    ) -> None:
        self.plan = plan
        self.staged = staged
        self.usable = True
        self.touched = False
        """Whether bytes have been fetched into the arena, which makes it resident."""
        self.reads_may_be_active = False
        self.landings_may_be_active = False
        self.bytes_total = sum(step.bytes_to_move for step in plan.steps)
        self.reset_counters()
        self._sources = manifests
        self._transport = transport
        self._reads: dict[int, list[PreparedTransfer]] = {}
        """Straight into place, by the first of the steps that they are for."""
        self._packed: list[list[list[PreparedTransfer]]] = []
        """By way of the scratch area: of every step, batch by batch."""
        for manifest in manifests:
            if met:
                transport.add_peer(manifest.agent, manifest.agent_metadata)
            else:
                meet(transport, manifest)
        self._buffer = ReceiveBuffer(plan, transport, staged=staged, live=live)
        self._greetings = Greetings(manifests, transport) if plan.direct_bytes else None
        try:
            for steps in self._always_together():
                self._reads[steps.start] = self._joined(steps)
            for step in plan.steps:
                self._packed.append([self._packed_reads(batch) for batch in step.packed])
        except BaseException:
            self.close()
            raise

    @property
    def arena_bytes(self) -> int:
        """Size of the receive buffer, scratch included."""
        return self._buffer.nbytes

    @property
    def windows(self) -> Sequence[Window]:
        """Where each step lies, and which ones must be installed before it is fetched."""
        return self._buffer.windows

    def reset_counters(self) -> None:
        """Start counting bytes and wire seconds anew."""
        self.bytes_done = 0
        self.wire_s = 0.0

    def greet(
        self, *, stall_timeout_s: float, deadline: float, cancelled: Callable[[], bool]
    ) -> None:
        """Read a few bytes of every source, so that one that is gone is found here.

        Raises:
            TransportError: a source gives nothing.
        """
        if self._greetings is not None:
            reads = self._greetings.reads
            self._run(range(1), reads, stall_timeout_s, deadline, cancelled)
            self.reset_counters()

    def tensors(self, index: int) -> list[tuple[str, torch.Tensor]]:
        """Views of a fetched step's whole tensors, by HF name; not of a direct step."""
        return self._buffer.tensors(index)

    def steps_with_room(self, index: int, installed: int) -> range:
        """Steps from `index` on that may be fetched together, once `installed` are installed.

        Together they cost one wait instead of one each. They take half of the arena at most, so
        that the other half can be installed meanwhile; a step that is larger goes alone. Steps that
        land directly do not go with others.
        """
        steps = self.plan.steps
        direct = steps[index].direct
        limit = BATCH_BYTES if direct else min(self._buffer.ring_bytes // 2, BATCH_BYTES)
        end, size = index + 1, _room(steps[index])
        while end < len(steps) and self.windows[end].installed_before <= installed:
            size += _room(steps[end])
            if size > limit or steps[end].direct != direct:
                break
            end += 1
        return range(index, end)

    def run_steps(
        self,
        steps: range,
        *,
        stall_timeout_s: float,
        deadline: float,
        cancelled: Callable[[], bool],
    ) -> None:
        """Fetch steps; returns when all their bytes are in place.

        Raises:
            TransportError: with the peer's and the tensors' names. The reads are then in no state
                to be posted again: `usable` is false.
        """
        reads = [read for index in steps for read in self._reads.get(index, ())]
        try:
            self._run(steps, reads, stall_timeout_s, deadline, cancelled)
        except TransferTimeoutError:
            self.landings_may_be_active = self.plan.steps[steps.start].direct
            raise
        for index in steps:
            batches = zip(self.plan.steps[index].packed, self._packed[index], strict=True)
            for batch, reads in batches:
                self._run(range(index, index + 1), reads, stall_timeout_s, deadline, cancelled)
                for piece in batch:
                    self._buffer.spread(index, piece)

    def close(self) -> None:
        """Release the reads, then the arena."""
        self._release_reads()
        self._buffer.close()
        if self._greetings is not None:
            self._greetings.close()

    def quarantine(self) -> None:
        """Give up the arena without freeing it: a read that timed out may still write to it."""
        self.usable = False
        self._buffer.quarantine()
        if self._greetings is not None:
            self._greetings.quarantine()

    def _run(
        self,
        steps: range,
        reads: Sequence[PreparedTransfer],
        stall_timeout_s: float,
        deadline: float,
        cancelled: Callable[[], bool],
    ) -> None:
        if not reads:
            return
        self.touched = True
        began, before = time.perf_counter(), self.bytes_done

        def count(done: int, _total: int) -> None:
            self.bytes_done = before + done

        patience = stall_timeout_s + sum(read.nbytes for read in reads) / SLOWEST_BYTES_PER_S
        limit = min(patience, max(deadline - time.monotonic(), 0.001))
        try:
            run_transfers(reads, deadline_s=limit, on_progress=count, cancelled=cancelled)
        except TransportError as error:
            self.usable = False
            self.reads_may_be_active = isinstance(error, TransferTimeoutError)
            names = [tensor.name for index in steps for tensor in self.plan.steps[index].tensors]
            error.message += (
                f"; it was giving {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}, after "
                f"{self.bytes_done} of {self.bytes_total} bytes"
            )
            raise
        self.wire_s += time.perf_counter() - began

    def _always_together(self) -> Iterator[range]:
        """Steps whose reads can be joined: those that never wait for one another's install."""
        index = 0
        while index < len(self.plan.steps):
            alone = not (self.staged or self.plan.steps[index].direct)
            steps = range(index, index + 1) if alone else self.steps_with_room(index, installed=0)
            yield steps
            index = steps.stop

    def _joined(self, steps: range) -> list[PreparedTransfer]:
        """The reads of steps, by source and device: few transfers to post and to ask about."""
        tables: dict[tuple[int, int, int], list[Descriptors]] = {}
        for index in steps:
            base, device = self._buffer.place(index)
            for read in self.plan.steps[index].reads:
                table = read.descriptors.copy()
                table[:, 0] += np.uint64(base)
                tables.setdefault((read.source, read.remote_device, device), []).append(table)
        return [
            self._read(source, part, local_device=device, remote_device=remote_device)
            for (source, remote_device, device), rows in tables.items()
            for part in _parts(np.concatenate(rows))
        ]

    def _packed_reads(self, batch: Sequence[PackedPiece]) -> list[PreparedTransfer]:
        by_peer: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for piece in batch:
            row = (
                self._buffer.scratch + piece.scratch_offset,
                piece.remote_address,
                piece.nbytes,
            )
            by_peer.setdefault((piece.source, piece.remote_device), []).append(row)
        return [
            self._read(
                source, np.array(rows, np.uint64), local_device=HOST, remote_device=remote_device
            )
            for (source, remote_device), rows in by_peer.items()
        ]

    def _read(
        self, source: int, table: Descriptors, *, local_device: int, remote_device: int
    ) -> PreparedTransfer:
        return self._transport.prepare_read(
            self._sources[source].agent,
            table,
            local_device=local_device,
            remote_device=remote_device,
        )

    def _release_reads(self) -> None:
        batches = (reads for step in self._packed for reads in step)
        for reads in (*self._reads.values(), *batches):
            for read in reads:
                read.release()
        self._reads, self._packed = {}, []


def _room(step: Step) -> int:
    """Bytes of a step, as a batch of several counts them."""
    return step.bytes_needed if step.direct else step.nbytes


def _parts(table: Descriptors) -> list[Descriptors]:
    return np.array_split(table, -(-len(table) // MOST_DESCRIPTORS))
