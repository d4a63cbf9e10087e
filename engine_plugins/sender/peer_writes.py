"""One rank's writes to one engine rank: prepared once, counted, and named in every error."""

from __future__ import annotations

import time

from engine_plugins.errors import TransportError
from engine_plugins.sender.small_writes import SmallWrites
from engine_plugins.weights.transport.base import (
    Descriptors,
    Direction,
    PreparedTransfer,
    Transport,
)
from engine_plugins.weights.transport.regions import HOST
from engine_plugins.weights.transport.transfers import transfers_of

__all__ = ["PeerWrites"]


class PeerWrites:
    """Everything that this process writes to one engine rank.

    Args:
        who: the engine rank, for people.
        agent: its transport agent, which was met.
        transport: ours.

    Attributes:
        who: as given.
        writes: prepared, of some ranges each.
        ranges, gathered: ranges written, and pieces that were copied into them first.
    """

    def __init__(self, who: str, agent: str, transport: Transport) -> None:
        self.who = who
        self.writes: list[_CountedWrite] = []
        self.ranges = self.gathered = 0
        self._agent = agent
        self._transport = transport
        self._slots: list[SmallWrites] = []

    def add(self, rows: Descriptors, *, local_device: int, remote_device: int) -> None:
        """Prepare writes of [n, 3] uint64 ranges (local address, remote address, bytes).

        Raises:
            TransportError: memory that is not registered.
        """
        if local_device == HOST:  # on a GPU it was not measured
            small = SmallWrites(rows, self._transport)
            self._slots.append(small)
            self.gathered += small.gathered
            rows = small.rows
        self.ranges += len(rows)
        for part in transfers_of(rows):
            write = self._transport.prepare_write(
                self._agent, part, local_device=local_device, remote_device=remote_device
            )
            self.writes.append(_CountedWrite(write, f"{self.who} (agent {self._agent})"))

    def begin(self) -> None:
        """Copy small pieces as they are now, and count anew."""
        for small in self._slots:
            small.gather()
        for write in self.writes:
            write.posted_s, write.ended = 0.0, False

    def progress(self) -> str:
        """How far it is, for people."""
        ended = [write for write in self.writes if write.ended]
        done, total = (sum(each.nbytes for each in some) for some in (ended, self.writes))
        return f"{self.who}: {len(ended)} of {len(self.writes)} writes, {done} of {total} bytes"

    @property
    def unfinished(self) -> bool:
        """Whether a write has not ended."""
        return not all(write.ended for write in self.writes)

    def release(self, *, ended: bool) -> None:
        """Give the writes back; memory that one under way may still read is not freed."""
        for write in self.writes:
            write.release()
        for small in self._slots:
            small.close() if ended else small.quarantine()
        self.writes, self._slots = [], []


class _CountedWrite:
    """A prepared write that knows what its post cost, whether it ended, and whose it is."""

    def __init__(self, write: PreparedTransfer, who: str) -> None:
        self._write = write
        self._who = who
        self.posted_s = 0.0
        self.ended = False

    @property
    def direction(self) -> Direction:
        return self._write.direction

    @property
    def peer(self) -> str:
        return self._who

    @property
    def nbytes(self) -> int:
        return self._write.nbytes

    def post(self) -> None:
        began = time.perf_counter()
        try:
            self._write.post()
        except TransportError as error:
            self._name(error)
            raise
        finally:
            self.posted_s += time.perf_counter() - began

    def done(self) -> bool:
        try:
            self.ended = self._write.done()
        except TransportError as error:
            self._name(error)
            raise
        return self.ended

    def release(self) -> None:
        self._write.release()

    def _name(self, error: TransportError) -> None:
        error.message = f"writing to {self._who}: {error.message}"
