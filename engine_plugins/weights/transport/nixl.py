"""The NIXL wire: one-sided reads and writes over UCX. The only module that imports NIXL.

NIXL's bindings are driven without their Python wrapper, for one reason: the wrapper sets the
progress thread's delay to 0, which spins a whole core per idle agent. Everything else is theirs:
prepared lists, prepared requests that are posted again for every update, remote disconnects.
What arrives from peers is numbers and checksummed metadata, never a pickled descriptor list.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from engine_plugins.errors import NotConfiguredError, PeerError, PeerLostError, TransportError
from engine_plugins.weights.transport import quarantine
from engine_plugins.weights.transport.agent_start import home_is_readable, net_devices_are
from engine_plugins.weights.transport.base import Descriptors, Direction
from engine_plugins.weights.transport.regions import HOST, RegionTable, check_descriptors
from engine_plugins.weights.transport.vetting import vet

__all__ = ["NixlTransport"]

logger = logging.getLogger(__name__)

_PACKAGES = ("nixl", "nixl_cu13", "nixl_cu12")
_POLL_INTERVAL_US = 10_000
"""How often the progress thread looks without having been woken. At 0 NIXL spins a core."""


@functools.cache
def _bindings() -> ModuleType:
    """Import NIXL's bindings from whichever of its packages is installed.

    Raises:
        NotConfiguredError: none is, or none matches this machine.
    """
    # UCX would otherwise catch SIGHUP and stop the process for a debugger.
    os.environ.setdefault("UCX_DEBUG_SIGNO", "0")
    failures = []
    for package in _PACKAGES:
        try:
            return importlib.import_module(f"{package}._bindings")
        except ImportError as error:
            failures.append(f"{package}: {error}")
    raise NotConfiguredError(
        f"NIXL cannot be imported ({'; '.join(failures)}), so weights cannot travel over RDMA",
        remedy="pip install 'engine-plugins[nixl]' (or nixl-cu12 or nixl-cu13 alone)",
    )


@functools.cache
def _nixl_errors() -> tuple[type[Exception], ...]:
    """Every exception class of the loaded bindings; they share no base of their own."""
    found = vars(_bindings()).items()
    return tuple(kind for name, kind in found if name.startswith("nixl") and name.endswith("Error"))


@dataclass(eq=False)
class _Peer:
    """One meeting with a peer; a peer met again is another one."""

    agent: str
    metadata: bytes = b""
    lost: bool = False


class _NixlTransfer:
    """A prepared request of NIXL's and its two prepared lists.

    NIXL flushes the endpoint at the end of every request, so a write that it calls done is in
    the peer's memory and needs no notification. What is dropped without a word, on the way of an
    error say, is given back to NIXL with this object.
    """

    def __init__(
        self,
        owner: NixlTransport,
        direction: Direction,
        peer: _Peer,
        nbytes: int,
        request: int,
        lists: list[int],
    ) -> None:
        self._owner = owner
        self._direction = direction
        self._peer = peer
        self._nbytes = nbytes
        self._request: int | None = request
        self._give_back = weakref.finalize(self, owner._release, request, lists)
        self._give_back.atexit = False
        self._state = "prepared"

    @property
    def direction(self) -> Direction:
        return self._direction

    @property
    def peer(self) -> str:
        return self._peer.agent

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def post(self) -> None:
        if self._state == "posted":
            raise TransportError(
                f"{self.peer}: this {self._direction} of {self._nbytes} bytes is still under way",
                remedy="wait until done() before posting it again",
            )
        request = self._usable()
        self._owner._check_alive(self._peer)
        doing = f"posting a {self._direction} of {self._nbytes} bytes"
        with self._owner._translated(doing, self._peer):
            status = self._owner._nixl.postXferReq(request, b"")
            self._state = "done" if self._finished(status) else "posted"

    def done(self) -> bool:
        if self._state == "done":
            return True
        if self._state == "prepared":
            raise TransportError(
                f"{self.peer}: this {self._direction} was never posted", remedy="call post()"
            )
        # Asked even of a peer that is lost: only NIXL knows when its last request has ended.
        request = self._usable()
        try:
            doing = f"a {self._direction} of {self._nbytes} bytes"
            with self._owner._translated(doing, self._peer):
                if self._finished(self._owner._nixl.getXferStatus(request)):
                    self._state = "done"
        except TransportError:
            self._state = "failed"
            raise
        return self._state == "done"

    def release(self) -> None:
        self._request = None
        self._give_back()

    def _usable(self) -> int:
        if self._request is None:
            raise TransportError(
                f"{self.peer}: this {self._direction} was released", remedy="prepare it again"
            )
        self._owner._check_met(self._peer, self._direction)
        return self._request

    def _finished(self, status: object) -> bool:
        bindings = _bindings()
        if status not in (bindings.NIXL_SUCCESS, bindings.NIXL_IN_PROG):
            raise TransportError(
                f"{self.peer}: a {self._direction} ended with NIXL status {status}"
            )
        return bool(status == bindings.NIXL_SUCCESS)


class NixlTransport:
    """One NIXL agent on UCX, with a progress thread and without a listener.

    Transfers may be posted and polled from any thread, one thread per transfer at a time.
    Registration, peers and `close` belong to one thread at a time. UCX chooses its wires from
    `UCX_TLS` and `UCX_NET_DEVICES`, which it reads for every agent anew.

    Args:
        agent: its name.
        net_devices: what `UCX_NET_DEVICES` is while this agent starts; None leaves it as it is.
        poll_interval_us: how often the progress thread looks without having been woken.

    Raises:
        NotConfiguredError: NIXL is not installed, or its configuration cannot be read.
        TransportError: UCX does not start with its present settings.
    """

    def __init__(
        self,
        agent: str,
        *,
        net_devices: str | None = None,
        poll_interval_us: int = _POLL_INTERVAL_US,
    ) -> None:
        bindings = _bindings()
        self._agent_name = agent
        self._net_devices = net_devices
        self._regions = RegionTable()
        self._peers: dict[str, _Peer] = {}
        self._transfers: weakref.WeakSet[_NixlTransfer] = weakref.WeakSet()
        config = bindings.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.pthrDelay = max(poll_interval_us, 1)
        config.syncMode = bindings.NIXL_THREAD_SYNC_RW
        with net_devices_are(net_devices), home_is_readable(), self._translated("starting UCX"):
            self._open: Any = bindings.nixlAgent(agent, config)
            self._open.createBackend("UCX", {})

    @property
    def kind(self) -> str:
        return "nixl"

    @property
    def agent(self) -> str:
        return self._agent_name

    def register(self, address: int, nbytes: int, device: int) -> None:
        nixl = self._nixl
        self._regions.add(address, nbytes, device)
        try:
            with self._translated(f"registering {nbytes} bytes at {address:#x}"):
                nixl.registerMem(_region(address, nbytes, device))
        except TransportError:
            self._regions.remove(address)
            raise

    def deregister(self, address: int) -> None:
        nixl = self._nixl
        nbytes, device = self._regions.remove(address)
        with self._translated(f"deregistering {nbytes} bytes at {address:#x}"):
            nixl.deregisterMem(_region(address, nbytes, device))

    def metadata(self) -> bytes:
        with self._translated("describing this agent"):
            return bytes(self._nixl.getLocalMD())

    def vet_peers(self, peers: Sequence[tuple[str, bytes]]) -> None:
        vet(peers, bindings_file=str(_bindings().__file__), net_devices=self._net_devices)

    def add_peer(self, agent: str, metadata: bytes) -> None:
        nixl = self._nixl
        if agent == self._agent_name:
            raise PeerError(
                f"{agent}: a peer bears this agent's own name, so it cannot be met",
                remedy="give every agent a name of its own",
            )
        known = self._peers.get(agent)
        if known is not None and known.metadata == metadata and not known.lost:
            return
        self.remove_peer(agent)
        peer = _Peer(agent, metadata)
        with self._translated("meeting it", peer):
            named = nixl.loadRemoteMD(metadata).decode(errors="replace")
        if named != agent:
            self._peers[named] = peer
            self.remove_peer(named)
            raise PeerError(
                f"{agent}: its metadata describes an agent named {named!r}; both were forgotten",
                remedy="publish the source again, with the name of the agent that made it",
            )
        self._peers[agent] = peer

    def remove_peer(self, agent: str) -> None:
        if self._peers.pop(agent, None) is not None:
            with self._translated("forgetting it", _Peer(agent)):
                self._nixl.invalidateRemoteMD(agent)

    def prepare_read(
        self, agent: str, descriptors: Descriptors, *, local_device: int, remote_device: int
    ) -> _NixlTransfer:
        return self._prepare("read", agent, descriptors, local_device, remote_device)

    def prepare_write(
        self, agent: str, descriptors: Descriptors, *, local_device: int, remote_device: int
    ) -> _NixlTransfer:
        return self._prepare("write", agent, descriptors, local_device, remote_device)

    def close(self) -> None:
        if self._open is None:
            return
        for transfer in list(self._transfers):
            transfer.release()
        for address, _, _ in self._regions.rows():
            self.deregister(address)
        self._peers.clear()
        self._open = None
        quarantine.agent_closed(self)

    @property
    def _nixl(self) -> Any:
        if self._open is None:
            raise TransportError(
                f"the agent {self._agent_name} is closed", remedy="make a new transport"
            )
        return self._open

    def _prepare(
        self,
        direction: Direction,
        agent: str,
        descriptors: Descriptors,
        local_device: int,
        remote_device: int,
    ) -> _NixlTransfer:
        nbytes = check_descriptors(agent, descriptors)
        peer = self._peers.get(agent)
        if peer is None:
            raise PeerError(f"{agent}: not a known peer", remedy="add_peer first")
        self._check_alive(peer)
        local, remote, lengths = descriptors.T
        self._regions.check_inside(self._agent_name, local, lengths, local_device)
        lists: list[int] = []
        request: int | None = None
        bindings = _bindings()
        operation = bindings.NIXL_READ if direction == "read" else bindings.NIXL_WRITE
        doing = f"preparing a {direction} of {len(lengths)} ranges, {nbytes} bytes"
        try:
            with self._translated(doing, peer):
                lists.append(self._list(bindings.NIXL_INIT_AGENT, local, lengths, local_device))
                lists.append(self._list(agent, remote, lengths, remote_device))
                rows = np.arange(len(lengths), dtype=np.int32)
                request = int(self._nixl.makeXferReq(operation, lists[0], rows, lists[1], rows))
        except TransportError:
            self._release(request, lists)
            raise
        transfer = _NixlTransfer(self, direction, peer, nbytes, request, lists)
        self._transfers.add(transfer)
        return transfer

    def _list(self, agent: str, addresses: np.ndarray, lengths: np.ndarray, device: int) -> int:
        memory, number = _memory(device)
        rows = np.empty((len(lengths), 3), dtype=np.uint64)
        rows[:, 0], rows[:, 1], rows[:, 2] = addresses, lengths, number
        return int(self._nixl.prepXferDlist(agent, _bindings().nixlXferDList(memory, rows)))

    def _release(self, request: int | None, lists: list[int]) -> None:
        if self._open is None:
            return
        try:
            if request is not None:
                self._open.releaseXferReq(request)
            for handle in lists:
                self._open.releasedDlistH(handle)
        except _nixl_errors() as error:
            logger.warning("%s: NIXL keeps a transfer that it cannot end: %s", self.agent, error)

    def _check_met(self, peer: _Peer, direction: Direction) -> None:
        """Refuse a peer that was removed or met again since."""
        if self._peers.get(peer.agent) is not peer:
            raise PeerError(
                f"{peer.agent}: it was removed or met again after this {direction} was prepared",
                remedy=f"prepare its {direction}s again",
            )

    def _check_alive(self, peer: _Peer) -> None:
        if peer.lost:
            raise _lost(peer.agent, "it was found dead before")

    @contextmanager
    def _translated(self, doing: str, peer: _Peer | None = None) -> Iterator[None]:
        """Turn NIXL's exceptions into ours; a disconnect marks the peer as lost."""
        try:
            yield
        except _nixl_errors() as error:
            raise _translate(error, doing, self._agent_name, peer) from error


def _translate(error: Exception, doing: str, agent: str, peer: _Peer | None) -> TransportError:
    bindings = _bindings()
    if peer is None:
        return TransportError(
            f"{agent}: NIXL failed at {doing}: {error}",
            remedy="check UCX_TLS and UCX_NET_DEVICES (a UCX_TLS without tcp, rc or dc cannot "
            "notice dead peers and is refused), and the lines that UCX wrote to stderr",
        )
    unreachable = doing == "meeting it" and isinstance(error, bindings.nixlBackendError)
    if unreachable or isinstance(error, bindings.nixlRemoteDisconnectError):
        peer.lost = True
        return _lost(peer.agent, f"NIXL says {error} at {doing}")
    return PeerError(
        f"{peer.agent}: NIXL refused at {doing}: {error}; nothing was moved",
        remedy="its memory was freed or its description is not whole: publish the source again, "
        "under a new agent name if it repeats, since NIXL keeps half-read metadata for good",
    )


def _lost(agent: str, seen: str) -> PeerLostError:
    return PeerLostError(
        f"{agent}: the peer is gone ({seen}); what was under way is incomplete",
        remedy="restart it and publish its source again, which meets it anew",
    )


def _memory(device: int) -> tuple[object, int]:
    """NIXL's segment kind and device number for a device of ours."""
    bindings = _bindings()
    return (bindings.DRAM_SEG, 0) if device == HOST else (bindings.VRAM_SEG, device)


def _region(address: int, nbytes: int, device: int) -> object:
    memory, number = _memory(device)
    rows = np.array([[address, nbytes, number]], dtype=np.uint64)
    return _bindings().nixlRegDList(memory, rows)
