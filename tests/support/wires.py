"""The wires that the transport contract runs over, each with peers that can be hurt."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine_plugins.weights.transport.base import PreparedRead, Transport
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from engine_plugins.weights.transport.nixl import NixlTransport
from tests.support.nixl_peer import PeerProcess, pattern

__all__ = ["WIRES", "InMemoryPeer", "InMemoryWire", "NixlWire", "Peer", "Target", "Wire"]

Bytes = npt.NDArray[np.uint8]
HOST = -1


class Peer(Protocol):
    """Somebody else's registered buffer, filled with `pattern(nbytes, seed)`."""

    agent: str
    nbytes: int
    address: int
    metadata: bytes

    def fill(self, seed: int) -> None: ...
    def kill(self) -> None: ...
    def stop(self) -> None: ...
    def resume(self) -> None: ...
    def close_agent(self) -> None: ...


class Wire(Protocol):
    """Makes transports for the test's own process, and peers for them to read from."""

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

    def fill(self, seed: int) -> None:
        self._buffer[:] = pattern(self.nbytes, seed)

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

    def fill(self, seed: int) -> None:
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
    """A registered buffer of 0xFF bytes (NaN in every float dtype) and reads into it."""

    def __init__(self, transport: Transport, nbytes: int) -> None:
        self._transport = transport
        self.bytes: Bytes = np.full(nbytes, 0xFF, dtype=np.uint8)
        self.address = int(self.bytes.ctypes.data)
        transport.register(self.address, nbytes, HOST)

    def read(self, peer: Peer, rows: list[tuple[int, int, int]]) -> PreparedRead:
        """Prepare a read of (local offset, remote offset, bytes) rows."""
        table = np.array(rows, dtype=np.uint64).reshape(-1, 3)
        table[:, 0] += np.uint64(self.address)
        table[:, 1] += np.uint64(peer.address)
        return self._transport.prepare_read(
            peer.agent, table, local_device=HOST, remote_device=HOST
        )


WIRES: dict[str, Callable[[], Wire]] = {
    "in_memory": InMemoryWire,
    "nixl": NixlWire,
    "nixl_tcp": NixlWire,
}
