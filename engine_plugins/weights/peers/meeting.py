"""Meeting a peer for certain: add it, then read a few of its bytes before anything depends on it.

A first contact over UCX now and then never completes although both sides live (about one in a
hundred fresh agents on a busy loopback; docs/decisions.md, D9). Met again, the peer answers. A
peer that is stopped is found here, by name, and not in the middle of an update.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Self

import numpy as np

from engine_plugins.errors import TransferTimeoutError, UnsupportedError
from engine_plugins.weights.contract.manifest import SourceManifest, numbers
from engine_plugins.weights.memory.arena import Arena
from engine_plugins.weights.transport.base import PreparedTransfer, Transport
from engine_plugins.weights.transport.regions import HOST
from engine_plugins.weights.transport.transfers import run_transfers

__all__ = ["Greeting", "meet", "meet_agent", "require_same_wire"]

logger = logging.getLogger(__name__)

PATIENCE_S = (1.0, 1.0, 2.0)
"""How long each attempt waits for the first bytes."""
GREETING_BYTES = 64


def require_same_wire(transport: Transport, manifest: SourceManifest) -> None:
    """Check that a source speaks as this engine does: metadata of another wire says nothing here.

    Raises:
        UnsupportedError: names both wires.
    """
    if manifest.transport != transport.kind:
        raise UnsupportedError(
            f"{manifest.source} offers its memory over {manifest.transport!r}, and this engine's "
            f"ranks read and write over {transport.kind!r}",
            remedy=f"give the sender a transport of kind {transport.kind!r}",
        )


def meet(transport: Transport, manifest: SourceManifest) -> None:
    """Add the peer that a manifest describes and read its first bytes.

    Raises:
        PeerError: the peer's description or memory is refused.
        PeerLostError: the peer is dead.
        TransferTimeoutError: it is there, but gives nothing.
    """
    meet_agent(
        transport,
        manifest.agent,
        manifest.agent_metadata,
        greeting=Greeting.of(manifest),
        who=manifest.source,
    )


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """Memory of a peer, of which a few bytes are read to see that it answers."""

    address: int
    nbytes: int
    device: int

    @classmethod
    def of(cls, manifest: SourceManifest) -> Self | None:
        """The first memory that a source has registered, if there is any."""
        regions = manifest.regions
        if not regions.addresses:
            return None
        return cls(
            address=int(numbers(regions.addresses)[0]),
            nbytes=int(numbers(regions.nbytes)[0]),
            device=int(numbers(regions.devices)[0]),
        )

    def prepared(self, transport: Transport, agent: str, into: int) -> PreparedTransfer:
        """A read of its first bytes to an address of ours in host memory."""
        row = [into, self.address, min(GREETING_BYTES, self.nbytes)]
        return transport.prepare_read(
            agent, np.array([row], dtype=np.uint64), local_device=HOST, remote_device=self.device
        )


def meet_agent(
    transport: Transport, agent: str, metadata: bytes, *, greeting: Greeting | None, who: str
) -> None:
    """Add a peer and read its first bytes.

    Args:
        transport: ours.
        agent: the peer's name.
        metadata: its description, whose checksum was compared.
        greeting: memory that it has registered; None where it has none.
        who: the peer's process, for people.

    Raises:
        PeerError: the peer's description or memory is refused.
        PeerLostError: the peer is dead.
        TransferTimeoutError: it is there, but gives nothing.
    """
    for patience_s in PATIENCE_S:
        transport.add_peer(agent, metadata)
        if greeting is None or _answers(transport, agent, greeting, patience_s):
            return
        logger.warning(
            "%s gave no byte within %g s of being met; meeting it again", agent, patience_s
        )
        transport.remove_peer(agent)
    raise TransferTimeoutError(
        f"{who} (agent {agent}) gave no byte in {len(PATIENCE_S)} attempts "
        f"over {sum(PATIENCE_S):g} s",
        remedy="see whether that process is stopped, and whether its network can be reached",
    )


def _answers(transport: Transport, agent: str, greeting: Greeting, patience_s: float) -> bool:
    """Read the start of the peer's memory into a buffer that may be lost."""
    buffer = Arena(GREETING_BYTES, transport)
    read: PreparedTransfer | None = None
    try:
        read = greeting.prepared(transport, agent, buffer.address)
        run_transfers([read], deadline_s=patience_s, drain_s=0.0)
    except TransferTimeoutError:
        buffer.quarantine()
        return False
    finally:
        if read is not None:
            read.release()
        buffer.close()
    return True
