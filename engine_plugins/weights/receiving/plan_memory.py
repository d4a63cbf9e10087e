"""The memory that one engine rank's plans use: its agent, the receive buffer, live parameters."""

from __future__ import annotations

from collections.abc import Callable, Container

from engine_plugins.weights.memory.live_memory import LiveMemory
from engine_plugins.weights.peers.acquaintances import Acquaintances
from engine_plugins.weights.peers.meeting import require_same_wire
from engine_plugins.weights.planning.plan_data import FetchPlan
from engine_plugins.weights.receiving.connection import Connection
from engine_plugins.weights.receiving.landing import Landing
from engine_plugins.weights.receiving.prepared_fetch import PreparedFetch
from engine_plugins.weights.receiving.prepared_push import PreparedPush
from engine_plugins.weights.receiving.update_run import PreparedPlan
from engine_plugins.weights.transport.base import Transport
from engine_plugins.weights.transport.quarantine import reclaim

__all__ = ["PlanMemory"]


class PlanMemory:
    """Holds one plan with its memory at a time, from update to update while it fits.

    Args:
        make_transport: makes the agent of this process when the first plan needs it.
    """

    def __init__(self, make_transport: Callable[[], Transport]) -> None:
        self._make_transport = make_transport
        self._transport: Transport | None = None
        self._peers: Acquaintances | None = None
        self._prepared: tuple[str, PreparedPlan] | None = None
        self._live: tuple[frozenset[str], LiveMemory] | None = None

    @property
    def transport(self) -> Transport:
        """The agent, made now if it was not."""
        if self._transport is None:
            self._transport = self._make_transport()
        return self._transport

    @property
    def peers(self) -> Acquaintances:
        """The agent's."""
        if self._peers is None:
            self._peers = Acquaintances(self.transport)
        return self._peers

    @property
    def held_bytes(self) -> int:
        """Of the receive buffer, what an earlier update has made resident."""
        if self._prepared is None or not self._prepared[1].touched:
            return 0
        return self._prepared[1].arena_bytes

    def prepare(
        self,
        plan_id: str,
        connected: Connection,
        plan: FetchPlan,
        landing: Landing,
        *,
        staged: bool,
        met: bool = False,
    ) -> PreparedPlan:
        """The plan with its memory; anything else is let go first.

        Args:
            plan_id: of the connection.
            connected: says who sends, and which way.
            plan: what goes where.
            landing: which live parameters are registered for a plan that lands in them.
            staged: whether nothing is installed before every byte is here.
            met: whether the sources are known to be there.

        Raises:
            UnsupportedError: a source speaks over another wire, or the buffer finds no room.
            TransportError: a source cannot be met, or memory not be registered.
        """
        kept = self.keep(plan_id, plan, staged=staged)
        if kept is not None:
            return kept
        self.reclaim()
        for manifest in connected.manifests:
            require_same_wire(self.transport, manifest)
        live = self._live_memory(landing) if plan.direct_bytes else None
        sources, wire = connected.manifests, self.transport
        made: PreparedPlan
        if connected.direction == "push":
            made = PreparedPush(plan, sources, wire, live=live, peers=self.peers)
        else:
            made = PreparedFetch(
                plan, sources, wire, staged=staged, live=live, peers=self.peers, met=met
            )
        self._prepared = (plan_id, made)
        return made

    def keep(self, plan_id: str, plan: FetchPlan, *, staged: bool) -> PreparedPlan | None:
        """What was prepared for just this; anything else is let go."""
        prepared = self.of(plan_id)
        fits = prepared is not None and prepared.staged == staged and prepared.usable
        if prepared is not None and fits and prepared.plan is plan:
            return prepared
        self.release()
        return None

    def of(self, plan_id: str) -> PreparedPlan | None:
        """What was prepared for a connection, whatever it is."""
        known = self._prepared
        return known[1] if known is not None and known[0] == plan_id else None

    def release(self) -> None:
        """Give back the receive buffer."""
        known, self._prepared = self._prepared, None
        if known is not None:
            known[1].close()

    def quarantine(self, pulling: Callable[[], bool]) -> None:
        """Give up the receive buffer without freeing it: bytes may still come in.

        Args:
            pulling: whether the thread of the pull that was given up is still at its reads.
        """
        known, self._prepared = self._prepared, None
        if known is not None:
            known[1].quarantine(pulling)
        if self._peers is not None:
            self._peers.doubt()

    def reclaim(self) -> None:
        """Have back what earlier updates lost, as far as nothing can come into it any more."""
        if self._transport is not None:
            reclaim(self._transport)

    def forget_peers(self, but: Container[str] = ()) -> None:
        """Forget all peers but the named agents."""
        if self._peers is not None:
            self._peers.forget_others(but)

    def deregister_live(self) -> None:
        """Hold on to no live parameter."""
        live, self._live = self._live, None
        if live is not None:
            live[1].close()

    def close(self) -> None:
        """End the agent, if there is one."""
        transport, self._transport = self._transport, None
        self._peers = None
        if transport is not None:
            transport.close()

    def _live_memory(self, landing: Landing) -> LiveMemory:
        """The proven modules' parameters, registered."""
        proven = frozenset(landing.proven)
        if self._live is None or self._live[0] != proven:
            self.deregister_live()
            self._live = (proven, LiveMemory(landing.memory(), self.transport))
        return self._live[1]
