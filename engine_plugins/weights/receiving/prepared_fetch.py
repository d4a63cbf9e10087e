"""A plan made ready to pull: peers met, memory registered, reads prepared once for many updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from engine_plugins.errors import TransferTimeoutError, TransportError
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.contract.version_word import WordReader
from engine_plugins.weights.memory.live_memory import LiveMemory
from engine_plugins.weights.peers.acquaintances import Acquaintances
from engine_plugins.weights.planning.plan_data import FetchPlan, PackedBatch, Step
from engine_plugins.weights.planning.ring import Window
from engine_plugins.weights.receiving.late_bytes import LateReads
from engine_plugins.weights.receiving.receive_buffer import ReceiveBuffer
from engine_plugins.weights.transport.base import Descriptors, PreparedTransfer, Transport
from engine_plugins.weights.transport.regions import HOST
from engine_plugins.weights.transport.transfers import run_transfers, transfers_of

__all__ = ["PreparedFetch", "sources_of"]

BATCH_BYTES = 256 << 20
"""The most that is fetched in one go; a step that is larger goes alone."""
LEAST_FOR_WORDS_S = 1.0
"""What the version words may take after the last byte, however near the deadline is then."""


class PreparedFetch:
    """Reads of every step of a plan, into one arena or straight into live parameters.

    Used by one pull thread at a time.

    Args:
        plan: what to fetch.
        manifests: the sources, as the plan numbers them.
        transport: does the reads.
        staged: whether the arena holds every step at once.
        live: the parameters that direct steps land in; it stays the caller's to close.
        peers: of the transport; of its own if there are none yet.
        met: whether the sources have been read from since their manifests came. They are not again
            then: a source that is stopped would hold the caller, who holds the engine; the pull
            finds it.

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
        peers: Acquaintances | None = None,
        met: bool = False,
    ) -> None:
        self.plan = plan
        self.staged = staged
        self._fit = True
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
        read = [manifests[each] for each in sources_of(plan)]
        self._peers = peers or Acquaintances(transport)
        self._peers.meet(read, anew=not met)
        self._buffer = ReceiveBuffer(plan, transport, staged=staged, live=live)
        self._words: WordReader | None = None
        self._lookout: WordReader | None = None
        try:
            self._words = WordReader(read, transport)
            for steps in self._always_together():
                self._reads[steps.start] = self._joined(steps)
            for step in plan.steps:
                self._packed.append([self._packed_reads(batch) for batch in step.packed])
        except BaseException:
            self.close()
            raise

    @property
    def usable(self) -> bool:
        """Whether it may be run again."""
        return self._fit and self._words is not None and self._words.usable

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
        self._word: int | None = None
        self._words_begun = False

    def greet(
        self,
        word: int | None,
        *,
        stall_timeout_s: float,
        deadline: float,
        cancelled: Callable[[], bool],
    ) -> None:
        """Read the version words before live parameters are written, or with the first bytes.

        So a source that is gone is found while the old weights are whole.

        Args:
            word: what the words must be; None takes them as they are now.
            stall_timeout_s: how long a source may say nothing.
            deadline: on the monotonic clock.
            cancelled: ends it early.

        Raises:
            SourceRevokedError: the offer of these weights was taken back.
            TransportError: a source gives nothing.
        """
        self._word = word
        if self.plan.direct_bytes:
            self._run(range(1), [], stall_timeout_s, deadline, cancelled)
            self.wire_s = 0.0

    def check(
        self, *, stall_timeout_s: float, deadline: float, cancelled: Callable[[], bool]
    ) -> None:
        """See that no source took its offer back until the last byte was here.

        Raises:
            SourceRevokedError: one did: what is here may be a mixture.
            TransportError: one cannot be asked any more.
        """
        left = max(deadline - time.monotonic(), LEAST_FOR_WORDS_S)
        self._word_reader.check(limit_s=min(stall_timeout_s, left), cancelled=cancelled)

    def confirm(self) -> None:
        """The same just before the version is published, of sources that still answer.

        Raises:
            SourceRevokedError: one took its offer back.
        """
        self._word_reader.confirm()

    def look(self) -> None:
        """See whether the sources of what is here are still there, while it waits.

        By reads of its own: one that does not end must not be in the way of `confirm`.

        Raises:
            PeerLostError: one is gone.
            SourceRevokedError: one took its offer back.
        """
        if self._lookout is None:
            sources = [self._sources[each] for each in sources_of(self.plan)]
            self._lookout = WordReader(sources, self._transport)
        self._lookout.look(self._word_reader.expected)

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
        except TransferTimeoutError as error:
            self.landings_may_be_active = error.stuck and self.plan.steps[steps.start].direct
            raise
        for index in steps:
            for batch, reads in enumerate(self._packed[index]):
                self._run(range(index, index + 1), reads, stall_timeout_s, deadline, cancelled)
                self._buffer.spread(index, batch)

    def close(self) -> None:
        """Release the reads, then the arena."""
        self._release_reads()
        self._buffer.close()
        for reader in (self._words, self._lookout):
            if reader is not None:
                reader.close()

    def quarantine(self, pulling: Callable[[], bool] = lambda: False) -> None:
        """Give up the arena without freeing it: a read that timed out may still write to it.

        Args:
            pulling: whether the pull's thread is still at these reads.
        """
        self._fit = False
        sources = [self._sources[each] for each in sources_of(self.plan)]
        late = LateReads(self._take_reads(), sources, self._peers, self._transport)
        self._buffer.quarantine(
            lambda: not pulling() and late.ended(), ends_with_agent=not pulling()
        )
        self._word_reader.quarantine()

    @property
    def _word_reader(self) -> WordReader:
        if self._words is None:
            raise TransportError("this plan was never prepared in full", remedy="prepare it anew")
        return self._words

    def _run(
        self,
        steps: range,
        reads: Sequence[PreparedTransfer],
        stall_timeout_s: float,
        deadline: float,
        cancelled: Callable[[], bool],
    ) -> None:
        words = [] if self._words_begun else self._word_reader.reads
        if not reads and not words:
            return
        self.touched = True
        began, before = time.perf_counter(), self.bytes_done
        word_bytes = sum(word.nbytes for word in words)

        def count(done: int, _total: int) -> None:
            self.bytes_done = before + max(done - word_bytes, 0)

        try:
            run_transfers(
                [*words, *reads],
                deadline_s=max(deadline - time.monotonic(), 0.001),
                stall_timeout_s=stall_timeout_s,
                on_progress=count,
                cancelled=cancelled,
            )
        except TransportError as error:
            self._fit = False
            self.reads_may_be_active = isinstance(error, TransferTimeoutError) and error.stuck
            names = [tensor.name for index in steps for tensor in self.plan.steps[index].tensors]
            error.message += (
                f"; it was giving {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}, after "
                f"{self.bytes_done} of {self.bytes_total} bytes"
            )
            raise
        self.wire_s += time.perf_counter() - began
        if words:
            self._words_begun = True
            self._word_reader.begin(self._word)

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
            for part in transfers_of(np.concatenate(rows))
        ]

    def _packed_reads(self, batch: PackedBatch) -> list[PreparedTransfer]:
        return [
            self._read(source, part, local_device=HOST, remote_device=remote_device)
            for source, remote_device, rows in batch.by_peer()
            for part in transfers_of(batch.table.reads(rows, self._buffer.scratch))
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
        for read in self._take_reads():
            read.release()

    def _take_reads(self) -> list[PreparedTransfer]:
        batches = (reads for step in self._packed for reads in step)
        taken = [read for reads in (*self._reads.values(), *batches) for read in reads]
        self._reads, self._packed = {}, []
        return taken


def _room(step: Step) -> int:
    """Bytes of a step, as a batch of several counts them."""
    return step.bytes_needed if step.direct else step.nbytes


def sources_of(plan: FetchPlan) -> list[int]:
    """The sources that a plan takes bytes from, by their numbers in it."""
    straight = {read.source for step in plan.steps for read in step.reads}
    packed = (batch.by_peer() for step in plan.steps for batch in step.packed)
    return sorted(straight | {source for peers in packed for source, _, _ in peers})
