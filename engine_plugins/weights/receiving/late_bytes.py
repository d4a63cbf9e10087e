"""Whether bytes of an update that was given up may still come in.

Forgetting a peer does not stop what it still gives, nor does releasing the transfer (over TCP it
lands all the same), and closing the agent ends a trainer that was merely stopped once it goes on
(docs/decisions.md, D75). So a transfer has to end, or its peer.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine_plugins.errors import PeerError, PeerLostError, TransportError
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.contract.version_word import WordReader
from engine_plugins.weights.peers.acquaintances import Acquaintances
from engine_plugins.weights.transport.base import PreparedTransfer, Transport

__all__ = ["LateReads", "LateWrites"]


class LateReads:
    """Reads of ours that were under way when their pull was given up.

    Args:
        reads: all of the pull's; those that were never posted have ended.
        sources: that they read from.
        peers: of the transport.
        transport: does the reads.
    """

    def __init__(
        self,
        reads: Sequence[PreparedTransfer],
        sources: Sequence[SourceManifest],
        peers: Acquaintances,
        transport: Transport,
    ) -> None:
        self._left = list(reads)
        self._sources = {source.agent: source for source in sources}
        self._peers = peers
        self._transport = transport

    def ended(self) -> bool:
        """Whether none of them can bring a byte any more."""
        gone: dict[str, bool] = {}
        self._left = [read for read in self._left if not self._has_ended(read, gone)]
        return not self._left

    def _has_ended(self, read: PreparedTransfer, gone: dict[str, bool]) -> bool:
        try:
            return read.done()
        except PeerError:  # it was forgotten or met again: the wire no longer says
            if read.peer not in gone:
                source = self._sources[read.peer]
                gone[read.peer] = _is_gone(source, self._peers, self._transport)
            return gone[read.peer]
        except TransportError:
            return True


class LateWrites:
    """Writes of trainers that are not known to have ended.

    Args:
        writers: the trainers.
        peers: of the transport.
        transport: the agent that they write to.
    """

    def __init__(
        self, writers: Sequence[SourceManifest], peers: Acquaintances, transport: Transport
    ) -> None:
        self._left = list(writers)
        self._peers = peers
        self._transport = transport

    def ended(self) -> bool:
        """Whether every writer is gone."""
        self._left = [
            writer for writer in self._left if not _is_gone(writer, self._peers, self._transport)
        ]
        return not self._left


def _is_gone(source: SourceManifest, peers: Acquaintances, transport: Transport) -> bool:
    """Whether a process is known to be dead, or its agent closed."""
    try:
        peers.expect([source])
        reader = WordReader([source], transport)
    except PeerLostError:
        return True
    except TransportError:
        return False
    try:
        reader.look(None)
    except PeerLostError:
        return True
    finally:
        reader.close()
    return False
