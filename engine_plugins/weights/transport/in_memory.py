"""The wire within one process: the plainest transport that keeps the contract.

It exists so that everything above a transport can run without NIXL, and so that a peer's death
or slowness can be had on demand. It checks every address on both sides and copies real bytes.
Where it is stricter than NIXL: memory that a peer deregistered is refused, not touched.
"""

from __future__ import annotations

import ctypes
import json
import time
import uuid
import weakref
from collections.abc import Sequence

import numpy as np

from engine_plugins.errors import PeerError, PeerLostError, TransportError
from engine_plugins.weights.transport import quarantine
from engine_plugins.weights.transport.base import Descriptors, Direction
from engine_plugins.weights.transport.regions import HOST, RegionTable, check_descriptors

__all__ = ["InMemoryTransport"]

_living: weakref.WeakValueDictionary[str, InMemoryTransport] = weakref.WeakValueDictionary()
"""Agents of this process that are open, by incarnation."""


class InMemoryTransport:
    """One agent among the agents of this process.

    Args:
        agent: its name.
        bytes_per_s: how fast each transfer of others *from* or *to* this agent goes; None means
            at once. 0 stands for a stopped process: transfers are accepted and never move.
    """

    def __init__(self, agent: str, *, bytes_per_s: float | None = None) -> None:
        self.bytes_per_s = bytes_per_s
        self._agent = agent
        self._incarnation = uuid.uuid4().hex
        self._regions = RegionTable()
        self._peers: dict[str, str] = {}
        _living[self._incarnation] = self

    @property
    def kind(self) -> str:
        return "in_memory"

    @property
    def agent(self) -> str:
        return self._agent

    def register(self, address: int, nbytes: int, device: int) -> None:
        self._check_open()
        if device != HOST:
            raise TransportError(
                f"{self._agent}: this transport moves host memory only, not device {device}",
                remedy="use the nixl transport for device memory",
            )
        self._regions.add(address, nbytes, device)

    def deregister(self, address: int) -> None:
        self._check_open()
        self._regions.remove(address)

    def metadata(self) -> bytes:
        self._check_open()
        return json.dumps({"agent": self._agent, "incarnation": self._incarnation}).encode()

    def vet_peers(self, peers: Sequence[tuple[str, bytes]]) -> None:
        """Nothing to fear: it is JSON, read by Python."""

    def add_peer(self, agent: str, metadata: bytes) -> None:
        self._check_open()
        self.remove_peer(agent)
        try:
            described = json.loads(metadata)
            named, incarnation = str(described["agent"]), str(described["incarnation"])
        except (ValueError, KeyError, TypeError) as error:
            raise PeerError(
                f"{agent}: its {len(metadata)} bytes of metadata describe no agent: {error}",
                remedy="publish the source again",
            ) from error
        if named != agent or agent == self._agent:
            raise PeerError(
                f"{agent}: its metadata describes an agent named {named!r}, and ours is "
                f"{self._agent!r}",
                remedy="publish the source again, each agent under its own name",
            )
        _living_peer(agent, incarnation, "meeting")
        self._peers[agent] = incarnation

    def remove_peer(self, agent: str) -> None:
        self._peers.pop(agent, None)

    def prepare_read(
        self, agent: str, descriptors: Descriptors, *, local_device: int, remote_device: int
    ) -> _InMemoryTransfer:
        return self._prepare("read", agent, descriptors, local_device, remote_device)

    def prepare_write(
        self, agent: str, descriptors: Descriptors, *, local_device: int, remote_device: int
    ) -> _InMemoryTransfer:
        return self._prepare("write", agent, descriptors, local_device, remote_device)

    def close(self) -> None:
        _living.pop(self._incarnation, None)
        self._peers.clear()
        quarantine.agent_closed(self)

    def _prepare(
        self,
        direction: Direction,
        agent: str,
        descriptors: Descriptors,
        local_device: int,
        remote_device: int,
    ) -> _InMemoryTransfer:
        self._check_open()
        nbytes = check_descriptors(agent, descriptors)
        if agent not in self._peers:
            raise PeerError(f"{agent}: not a known peer", remedy="add_peer first")
        peer = _living_peer(agent, self._peers[agent], direction)
        local, remote, lengths = descriptors.T
        self._regions.check_inside(self._agent, local, lengths, local_device)
        peer._regions.check_inside(agent, remote, lengths, remote_device)
        return _InMemoryTransfer(
            self, direction, agent, self._peers[agent], descriptors.copy(), nbytes
        )

    def _check_open(self) -> None:
        if self._incarnation not in _living:
            raise TransportError(
                f"the agent {self._agent} is closed", remedy="make a new transport"
            )


class _InMemoryTransfer:
    """Copies rows one after the other, as far as the peer's speed allows."""

    def __init__(
        self,
        owner: InMemoryTransport,
        direction: Direction,
        agent: str,
        incarnation: str,
        descriptors: Descriptors,
        nbytes: int,
    ) -> None:
        self._owner = owner
        self._direction = direction
        self._agent = agent
        self._incarnation = incarnation
        self._descriptors = descriptors
        self._nbytes = nbytes
        self._next_row = len(descriptors)
        self._state = "prepared"
        self._posted_at = 0.0

    @property
    def direction(self) -> Direction:
        return self._direction

    @property
    def peer(self) -> str:
        return self._agent

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def post(self) -> None:
        if self._state in ("posted", "released"):
            raise TransportError(
                f"{self._agent}: this {self._direction} is {self._state}",
                remedy="wait for it, or prepare anew",
            )
        self._met_peer()
        self._next_row = 0
        self._state = "posted"
        self._posted_at = time.monotonic()

    def done(self) -> bool:
        if self._state == "done":
            return True
        if self._state != "posted":
            raise TransportError(
                f"{self._agent}: this {self._direction} is {self._state}", remedy="post it"
            )
        peer = self._met_peer()
        _, remote, lengths = self._descriptors[self._next_row :].T
        peer._regions.check_inside(self._agent, remote, lengths, HOST)
        allowed = self._nbytes
        if peer.bytes_per_s is not None:
            allowed = int((time.monotonic() - self._posted_at) * peer.bytes_per_s)
        ends = np.cumsum(self._descriptors[:, 2])
        while self._next_row < len(ends) and int(ends[self._next_row]) <= allowed:
            here, there, length = (int(x) for x in self._descriptors[self._next_row])
            target, source = (here, there) if self._direction == "read" else (there, here)
            ctypes.memmove(target, source, length)
            self._next_row += 1
        if self._next_row == len(ends):
            self._state = "done"
        return self._state == "done"

    def release(self) -> None:
        self._state = "released"

    def _met_peer(self) -> InMemoryTransport:
        self._owner._check_open()
        if self._owner._peers.get(self._agent) != self._incarnation:
            raise PeerError(
                f"{self._agent}: it was removed or met again after this {self._direction} was "
                "prepared",
                remedy=f"prepare its {self._direction}s again",
            )
        return _living_peer(self._agent, self._incarnation, self._direction)


def _living_peer(agent: str, incarnation: str, doing: str) -> InMemoryTransport:
    peer = _living.get(incarnation)
    if peer is None:
        raise PeerLostError(
            f"{agent}: the peer is gone (seen at this {doing}); what was under way is incomplete",
            remedy="restart it and publish its source again, which meets it anew",
        )
    return peer
