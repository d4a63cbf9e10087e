"""A plan made ready for the trainers to write: memory registered, and told to each of them.

The plan is the one of a pull, with the ends changed: what a read would fetch from a source is what
that source writes. There is no flow control between trainers and installs, so every step that does
not land directly has a place of its own, and so has every packed piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine_plugins.weights.contract.destinations import Destination, Writes
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.contract.version_word import WordReader
from engine_plugins.weights.memory.live_memory import LiveMemory
from engine_plugins.weights.peers.acquaintances import Acquaintances
from engine_plugins.weights.planning.plan_data import FetchPlan
from engine_plugins.weights.planning.ring import Window
from engine_plugins.weights.receiving.late_bytes import LateWrites
from engine_plugins.weights.receiving.prepared_fetch import sources_of
from engine_plugins.weights.receiving.receive_buffer import ReceiveBuffer
from engine_plugins.weights.transport.base import Descriptors, Transport
from engine_plugins.weights.transport.regions import HOST

__all__ = ["PreparedPush"]


class PreparedPush:
    """Memory that trainers write to, and what is done with it once they have.

    Args:
        plan: from `plan.laid_apart`.
        manifests: the sources, as the plan numbers them.
        transport: registers the memory.
        live: the parameters that direct steps land in; it stays the caller's to close.
        peers: of the transport; of its own if there are none yet.

    Raises:
        UnsupportedError: the machine has not the memory.
        TransportError: the memory cannot be registered.
    """

    staged = True

    def __init__(
        self,
        plan: FetchPlan,
        manifests: Sequence[SourceManifest],
        transport: Transport,
        *,
        live: LiveMemory | None = None,
        peers: Acquaintances | None = None,
    ) -> None:
        self.plan = plan
        self.usable = True
        self.touched = False
        self.reads_may_be_active = self.landings_may_be_active = False
        self.bytes_total = sum(step.bytes_to_move for step in plan.steps)
        self.reset_counters()
        self._sources = manifests
        self._transport = transport
        self._peers = peers or Acquaintances(transport)
        self._buffer = ReceiveBuffer(plan, transport, staged=True, live=live)
        self._lookout: WordReader | None = None

    @property
    def arena_bytes(self) -> int:
        """Size of the receive buffer, scratch included."""
        return self._buffer.nbytes

    @property
    def windows(self) -> Sequence[Window]:
        """Where each step lies."""
        return self._buffer.windows

    def destination(self, tp_rank: int) -> Destination:
        """What each source has to write, and to whom."""
        metadata = self._transport.metadata()
        writes = {
            manifest.agent: _writes(rows)
            for manifest, rows in zip(self._sources, self._rows(), strict=True)
            if rows
        }
        return Destination(
            tp_rank=tp_rank,
            agent=self._transport.agent,
            agent_metadata=metadata,
            agent_metadata_sha256=hashlib.sha256(metadata).hexdigest(),
            writes=writes,
        )

    def reset_counters(self) -> None:
        """Start counting bytes anew; wire seconds are the trainers' to measure."""
        self.bytes_done = 0
        self.wire_s = 0.0

    def greet(
        self,
        word: int | None,
        *,
        stall_timeout_s: float,
        deadline: float,
        cancelled: Callable[[], bool],
    ) -> None:
        """Nothing to ask: the sources come to us."""

    def check(
        self, *, stall_timeout_s: float, deadline: float, cancelled: Callable[[], bool]
    ) -> None:
        """Nor here: whoever says that all is written has waited for the last write."""

    def confirm(self) -> None:
        """Nor here."""

    def look(self) -> None:
        """See whether the trainers are still there, while their writes are waited for.

        Raises:
            PeerLostError: one is gone.
        """
        if self._lookout is None:
            writers = self._writers()
            self._peers.expect(writers)
            self._lookout = WordReader(writers, self._transport)
        self._lookout.look(None)

    def tensors(self, index: int) -> list[tuple[str, torch.Tensor]]:
        """Views of a written step's whole tensors, by HF name; not of a direct step."""
        return self._buffer.tensors(index)

    def steps_with_room(self, index: int, installed: int) -> range:
        """Every step from `index` on: all are here."""
        return range(index, len(self.plan.steps))

    def run_steps(
        self,
        steps: range,
        *,
        stall_timeout_s: float,
        deadline: float,
        cancelled: Callable[[], bool],
    ) -> None:
        """Spread the packed pieces of steps that have been written."""
        self.touched = True
        for index in steps:
            step = self.plan.steps[index]
            for batch in range(len(step.packed)):
                self._buffer.spread(index, batch)
            self.bytes_done += step.bytes_to_move

    def close(self) -> None:
        """Free the memory; a trainer that still writes is refused by the wire."""
        if self._lookout is not None:
            self._lookout.close()
        self._buffer.close()

    def quarantine(self, pulling: Callable[[], bool] = lambda: False) -> None:
        """Give up the arena without freeing it: a trainer may still write to it.

        One of this host writes past our agent, so it is free once every writer is gone.

        Args:
            pulling: whether a thread is still at this memory.
        """
        self.usable = False
        late = LateWrites(self._writers(), self._peers, self._transport)
        self._buffer.quarantine(lambda: not pulling() and late.ended(), ends_with_agent=False)

    def _writers(self) -> list[SourceManifest]:
        return [self._sources[each] for each in sources_of(self.plan)]

    def _rows(self) -> list[list[tuple[Descriptors, int, int]]]:
        """By source: [n, 3] descriptors as (its address, ours, bytes), its device and ours."""
        rows: list[list[tuple[Descriptors, int, int]]] = [[] for _ in self._sources]
        for index, step in enumerate(self.plan.steps):
            for read in step.reads:
                base, device = self._buffer.place(index)
                table = read.descriptors[:, [1, 0, 2]]
                table[:, 1] += np.uint64(base)
                rows[read.source].append((table, read.remote_device, device))
            for batch in step.packed:
                for source, device, pieces in batch.by_peer():
                    table = batch.table.reads(pieces, self._buffer.scratch)[:, [1, 0, 2]]
                    rows[source].append((table, device, HOST))
        return rows


def _writes(rows: Sequence[tuple[Descriptors, int, int]]) -> Writes:
    counts = [len(table) for table, _, _ in rows]
    return Writes.of(
        np.concatenate([table for table, _, _ in rows]),
        np.repeat(np.array([theirs for _, theirs, _ in rows], np.int32), counts),
        np.repeat(np.array([ours for _, _, ours in rows], np.int32), counts),
    )
