"""The seam between weights and wires.

A transport owns one agent of this process: it registers memory, describes itself to peers, reads
peers' memory and writes to it. It knows nothing of tensors. Every wait has a deadline of ours,
because the wires have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Descriptors", "Direction", "PreparedTransfer", "Transport"]

Descriptors = npt.NDArray[np.uint64]
"""[n, 3] uint64: local address, remote address, length in bytes."""

Direction = Literal["read", "write"]
"""`read`: the peer's bytes come here; `write`: ours go there."""


class PreparedTransfer(Protocol):
    """A read or a write of one peer's memory, prepared once and posted as often as wanted."""

    @property
    def direction(self) -> Direction:
        """Which way the bytes go."""
        ...

    @property
    def peer(self) -> str:
        """Name of the agent that is read from or written to."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that one run of this transfer moves."""
        ...

    def post(self) -> None:
        """Start the transfer, again if the last one is done; some wires copy within this call.

        Raises:
            PeerLostError: the peer is known to be gone.
            PeerError: the peer was removed or met again since; prepare the transfer anew.
            TransportError: the transfer is still under way, or was released.
        """
        ...

    def done(self) -> bool:
        """Say whether the posted transfer has completed; never blocks.

        Then the bytes are in place: of a read in our memory, of a write in the peer's. Memory
        that the peer deregistered but still maps is read and written without complaint: only a
        version or a digest shows that.

        Raises:
            PeerLostError: the peer died or closed.
            TransportError: anything else that ended the transfer.
        """
        ...

    def release(self) -> None:
        """Give the prepared handle back. Does not stop what is under way; twice is harmless."""
        ...


class Transport(Protocol):
    """One agent of this process on one wire."""

    @property
    def kind(self) -> str:
        """`nixl` or `in_memory`, as manifests name it."""
        ...

    @property
    def agent(self) -> str:
        """This agent's name, unique among all that will meet."""
        ...

    def register(self, address: int, nbytes: int, device: int) -> None:
        """Make memory reachable for peers and usable at our end of a transfer.

        The transport keeps no reference: the owner keeps the memory alive until `deregister`.
        `device` is a CUDA ordinal, or -1 for host memory. Peers learn of it from metadata that
        is made afterwards.

        Raises:
            TransportError: no bytes, or an overlap with what is registered.
        """
        ...

    def deregister(self, address: int) -> None:
        """Undo `register` of the region that starts at `address`.

        Raises:
            TransportError: no region starts there.
        """
        ...

    def metadata(self) -> bytes:
        """This agent and its registered memory, as opaque bytes for peers."""
        ...

    def vet_peers(self, peers: Sequence[tuple[str, bytes]]) -> None:
        """Refuse metadata that would crash or hang the process that loads it, before it is met.

        Args:
            peers: agents' names, each with its metadata; what was vetted before costs nothing.

        Raises:
            PeerError: loading one ends a process; the text names it.
            TransportError: it cannot be tried here.
        """
        ...

    def add_peer(self, agent: str, metadata: bytes) -> None:
        """Meet a peer, or meet it again after it restarted or registered more.

        A living peer that describes itself as before stays as it is, and so do its transfers.

        Transfers that were prepared from an earlier meeting can no longer be posted. The metadata
        must have passed its checksum: a truncated copy can make NIXL refuse that name for good.

        Raises:
            PeerError: the bytes do not describe an agent of that name.
            PeerLostError: nobody is there any more.
        """
        ...

    def remove_peer(self, agent: str) -> None:
        """Forget a peer; unknown names are ignored."""
        ...

    def prepare_read(
        self, agent: str, descriptors: Descriptors, *, local_device: int, remote_device: int
    ) -> PreparedTransfer:
        """Prepare a read from a peer into our registered memory.

        Args:
            agent: a peer that was added.
            descriptors: [n, 3] uint64 rows of (local address, remote address, bytes); copied.
                Every row at least one byte.
            local_device: where our memory lies (CUDA ordinal, or -1 for host memory).
            remote_device: where the peer's memory lies, in the peer's own numbering.

        Raises:
            PeerError: an address that the peer or we have not registered, or an unknown peer.
            PeerLostError: the peer is known to be gone.
            TransportError: the descriptors are malformed or empty.
        """
        ...

    def prepare_write(
        self, agent: str, descriptors: Descriptors, *, local_device: int, remote_device: int
    ) -> PreparedTransfer:
        """Prepare a write from our registered memory into a peer's.

        Args and errors are those of `prepare_read`: rows are (local address, remote address,
        bytes), and the bytes go from the local to the remote address.
        """
        ...

    def close(self) -> None:
        """Release transfers, regions and the agent; twice is harmless. Peers lose it."""
        ...
