"""The wires that the transport contract runs over, each with peers that can be hurt."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine_plugins.weights.transport.base import Direction, PreparedTransfer, Transport
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from engine_plugins.weights.transport.nixl import NixlTransport
from tests.support.nixl_peer import PeerProcess, pattern

__all__ = ["WIRES", "Flow", "InMemoryPeer", "InMemoryWire", "NixlWire", "Peer", "Target", "Wire"]

Bytes = npt.NDArray[np.uint8]
Rows = list[tuple[int, int, int]]
"""Local offset, remote offset, bytes."""
HOST = -1


class Peer(Protocol):
    """Somebody else's registered buffer, filled with `pattern(nbytes, seed)`."""

    agent: str
    nbytes: int
    address: int
    metadata: bytes

    def fill(self, seed: int | None) -> None: ...
    def contents(self) -> Bytes: ...
    def kill(self) -> None: ...
    def stop(self) -> None: ...
    def resume(self) -> None: ...
    def close_agent(self) -> None: ...


class Wire(Protocol):
    """Makes transports for the test's own process, and peers for them to meet."""

    def transport(self, agent: str) -> Transport: ...
    def peer(self, agent: str, nbytes: int, seed: int) -> Peer: ...
    def close(self) -> None: ...


class InMemoryPeer:
    """A peer in this process."""

    def __init__(self, agent: str, nbytes: int, seed: int) -> None:
        self.agent, self.nbytes = agent, nbytes
        self.transport = InMemoryTransport(agent)
        self._buffer = pattern(nbytes, seed)
        self.address = int(self._buffer.ctypes.data)
        self.transport.register(self.address, nbytes, HOST)
        self.metadata = self.transport.metadata()

    def fill(self, seed: int | None) -> None:
        self._buffer[:] = pattern(self.nbytes, seed)

    def contents(self) -> Bytes:
        return self._buffer.copy()

    def kill(self) -> None:
        self.transport.close()

    def stop(self) -> None:
        self.transport.bytes_per_s = 0.0

    def resume(self) -> None:
        self.transport.bytes_per_s = None

    def close_agent(self) -> None:
        self.transport.close()


class InMemoryWire:
    """Everything within this process."""

    def transport(self, agent: str) -> InMemoryTransport:
        return InMemoryTransport(agent)

    def peer(self, agent: str, nbytes: int, seed: int) -> InMemoryPeer:
        return InMemoryPeer(agent, nbytes, seed)

    def close(self) -> None:
        """Nothing outlives the test."""


class NixlPeer(PeerProcess):
    """A peer in a process of its own."""

    def fill(self, seed: int | None) -> None:
        self.ask("fill", seed=seed)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def stop(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def close_agent(self) -> None:
        self.ask("close")


class NixlWire:
    """NIXL between real processes. The caller sets UCX's environment for this process."""

    def __init__(self) -> None:
        self._open = ExitStack()

    def transport(self, agent: str) -> NixlTransport:
        made = NixlTransport(agent)
        self._open.callback(made.close)
        return made

    def peer(self, agent: str, nbytes: int, seed: int) -> NixlPeer:
        made = NixlPeer(agent, nbytes, seed, {})
        self._open.callback(made.end)
        return made

    def close(self) -> None:
        self._open.close()


class Target:
    """A registered buffer of our own, at first of 0xFF bytes, and transfers to and from it."""

    def __init__(self, transport: Transport, nbytes: int) -> None:
        self._transport = transport
        self.bytes: Bytes = pattern(nbytes, None)
        self.address = int(self.bytes.ctypes.data)
        transport.register(self.address, nbytes, HOST)

    def read(self, peer: Peer, rows: Rows) -> PreparedTransfer:
        """Prepare a read of (local offset, remote offset, bytes) rows."""
        return self.transfer("read", peer, rows)

    def transfer(self, direction: Direction, peer: Peer, rows: Rows) -> PreparedTransfer:
        """Prepare either, of (local offset, remote offset, bytes) rows."""
        table = np.array(rows, dtype=np.uint64).reshape(-1, 3)
        table[:, 0] += np.uint64(self.address)
        table[:, 1] += np.uint64(peer.address)
        prepare = {
            "read": self._transport.prepare_read,
            "write": self._transport.prepare_write,
        }[direction]
        return prepare(peer.agent, table, local_device=HOST, remote_device=HOST)


class Flow:
    """One direction between a buffer of ours and a peer's: one end gives, the other receives."""

    def __init__(
        self, direction: Direction, transport: Transport, peer: Peer, nbytes: int | None = None
    ) -> None:
        self.direction = direction
        self.peer = peer
        self.target = Target(transport, nbytes or peer.nbytes)

    def begin(self, seed: int) -> None:
        """Fill the giving end with a pattern and the receiving one with 0xFF."""
        ours, theirs = (None, seed) if self.direction == "read" else (seed, None)
        self.target.bytes[:] = pattern(self.target.bytes.size, ours)
        self.peer.fill(theirs)

    def prepare(self, rows: Rows) -> PreparedTransfer:
        """Prepare a transfer of (local offset, remote offset, bytes) rows."""
        return self.target.transfer(self.direction, self.peer, rows)

    def received(self) -> Bytes:
        """What is in the receiving end now."""
        return self.target.bytes if self.direction == "read" else self.peer.contents()

    def expected(self, seed: int, rows: Rows) -> Bytes:
        """What has to be there, once rows have arrived from an end that was filled with seed."""
        sizes = self.target.bytes.size, self.peer.nbytes
        if self.direction == "read":
            source, result = pattern(sizes[1], seed), pattern(sizes[0], None)
        else:
            source, result = pattern(sizes[0], seed), pattern(sizes[1], None)
        for local, remote, length in rows:
            to, at = (local, remote) if self.direction == "read" else (remote, local)
            result[to : to + length] = source[at : at + length]
        return result


WIRES: dict[str, Callable[[], Wire]] = {
    "in_memory": InMemoryWire,
    "nixl": NixlWire,
    "nixl_tcp": NixlWire,
}
