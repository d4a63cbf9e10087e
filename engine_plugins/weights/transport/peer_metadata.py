"""The checksum that stands between a peer's metadata and the agent that parses it.

Truncated metadata poisons a NIXL agent's entry for that peer for good, so nothing reaches
`Transport.add_peer` that has not passed `verify_metadata`. The checksum proves that the bytes
are whole, not that the peer is honest: who may publish is settled by authentication.
"""

from __future__ import annotations

import hashlib
import hmac

from engine_plugins.errors import PeerError

__all__ = ["metadata_sha256", "verify_metadata"]


def metadata_sha256(metadata: bytes) -> str:
    """The checksum that a manifest carries beside the metadata, in lower-case hex."""
    return hashlib.sha256(metadata).hexdigest()


def verify_metadata(metadata: bytes, sha256: str, *, agent: str) -> None:
    """Check that a peer's metadata arrived whole.

    Args:
        metadata: the opaque bytes that the peer published.
        sha256: the checksum that it published with them, in hex.
        agent: the peer's name, for the message.

    Raises:
        PeerError: the bytes are not the ones that the checksum was made of.
    """
    seen = metadata_sha256(metadata)
    if not hmac.compare_digest(seen.encode(), sha256.lower().encode()):
        raise PeerError(
            f"{agent}: its {len(metadata)} bytes of transport metadata have sha256 {seen[:12]}..., "
            f"published was {sha256[:12]}...; they were not given to the transport",
            remedy="publish the source again",
        )
