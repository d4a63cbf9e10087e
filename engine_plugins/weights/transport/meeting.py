"""Meeting a peer for certain: add it, then read a few of its bytes before anything depends on it.

A first contact over UCX now and then never completes although both sides live (about one in a
hundred fresh agents on a busy loopback; docs/decisions.md, D9). Met again, the peer answers. A
peer that is stopped is found here, by name, and not in the middle of an update.
"""

from __future__ import annotations

import logging

import numpy as np

from engine_plugins.errors import TransferTimeoutError
from engine_plugins.weights.arena import Arena
from engine_plugins.weights.manifest import SourceManifest
from engine_plugins.weights.transport.base import Transport
from engine_plugins.weights.transport.transfers import run_transfers

__all__ = ["meet"]

logger = logging.getLogger(__name__)

PATIENCE_S = (1.0, 1.0, 2.0)
"""How long each attempt waits for the first bytes."""
GREETING_BYTES = 64


def meet(transport: Transport, manifest: SourceManifest) -> None:
    """Add the peer that a manifest describes and read its first bytes.

    Raises:
        PeerError: the peer's description or memory is refused.
        PeerLostError: the peer is dead.
        TransferTimeoutError: it is there, but gives nothing.
    """
    for patience_s in PATIENCE_S:
        transport.add_peer(manifest.agent, manifest.agent_metadata)
        if _answers(transport, manifest, patience_s):
            return
        logger.warning(
            "%s gave no byte within %g s of being met; meeting it again",
            manifest.agent,
            patience_s,
        )
        transport.remove_peer(manifest.agent)
    raise TransferTimeoutError(
        f"{manifest.source} (agent {manifest.agent}) gave no byte in {len(PATIENCE_S)} attempts "
        f"over {sum(PATIENCE_S):g} s",
        remedy="see whether that process is stopped, and whether its network can be reached",
    )


def _answers(transport: Transport, manifest: SourceManifest, patience_s: float) -> bool:
    """Read the start of the peer's first region into a buffer that may be lost."""
    if not manifest.regions.addresses:
        return True
    nbytes = min(GREETING_BYTES, manifest.regions.nbytes[0])
    buffer = Arena(GREETING_BYTES, transport)
    row = [buffer.address, manifest.regions.addresses[0], nbytes]
    try:
        read = transport.prepare_read(
            manifest.agent,
            np.array([row], dtype=np.uint64),
            local_device=-1,
            remote_device=manifest.regions.devices[0],
        )
        run_transfers([read], deadline_s=patience_s)
    except TransferTimeoutError:
        buffer.quarantine()
        return False
    except BaseException:
        buffer.close()
        raise
    read.release()
    buffer.close()
    return True
