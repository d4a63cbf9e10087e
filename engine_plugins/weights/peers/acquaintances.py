"""The peers of one agent: met when a plan needs them, and forgotten with the last plan that does.

A wire keeps a peer's metadata, endpoints and sockets until it is told to forget it, and trainers
come and go under new names.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.peers.link import measure_links
from engine_plugins.weights.peers.meeting import meet
from engine_plugins.weights.transport.base import Transport

__all__ = ["Acquaintances"]


class Acquaintances:
    """Sources that an agent has met.

    Args:
        transport: the agent.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._met: dict[str, bytes] = {}
        self._measured: set[str] = set()

    def meet(self, manifests: Sequence[SourceManifest], *, anew: bool = True) -> None:
        """Meet sources that are about to be read from.

        Args:
            manifests: of these sources.
            anew: whether each is read from even if it was before. A source that is stopped holds
                the caller then, for some seconds.

        Raises:
            PeerError: a source's description or memory is refused.
            PeerLostError: a source is dead.
            TransferTimeoutError: a source is there, but gives nothing.
        """
        self._vet(manifests)
        for manifest in manifests:
            if not anew and self._met.get(manifest.agent) == manifest.agent_metadata:
                self._transport.add_peer(manifest.agent, manifest.agent_metadata)
                continue
            self._met[manifest.agent] = b""  # it may be half met, and is to be forgotten then
            meet(self._transport, manifest)
            self._met[manifest.agent] = manifest.agent_metadata

    def doubt(self) -> None:
        """Meet every one anew before it is read from again: one of them said nothing."""
        self._met = dict.fromkeys(self._met, b"")

    def expect(self, manifests: Sequence[SourceManifest]) -> None:
        """Know sources whose turn it is to come to us, without reading from them.

        Raises:
            PeerError: a source's description is refused.
            PeerLostError: a source is dead.
        """
        self._vet(manifests)
        for manifest in manifests:
            self._met.setdefault(manifest.agent, b"")
            self._transport.add_peer(manifest.agent, manifest.agent_metadata)

    def measure(self, manifests: Sequence[SourceManifest], *, expected_gbps: float | None) -> None:
        """See what the links to sources give that were met since, and say so in the log.

        Raises:
            TransportError: see `measure_links`.
        """
        new = [manifest for manifest in manifests if manifest.agent not in self._measured]
        if new:
            measure_links(self._transport, new, expected_gbps=expected_gbps)
        self._measured.update(manifest.agent for manifest in new)

    def forget_others(self, than: Container[str] = ()) -> None:
        """Forget all but the named agents; nothing that was prepared for them can be posted.

        Raises:
            TransportError: the wire could not forget one.
        """
        for agent in [agent for agent in self._met if agent not in than]:
            del self._met[agent]
            self._measured.discard(agent)
            self._transport.remove_peer(agent)

    def _vet(self, manifests: Sequence[SourceManifest]) -> None:
        self._transport.vet_peers([(each.agent, each.agent_metadata) for each in manifests])
