"""A push: every trainer rank writes its own bytes into the engines' memory.

Nothing is written before every engine has said that it is ready, and no engine is told to go on
before every rank has written all that is its to write.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from engine_plugins.errors import EnginePluginError, PeerError, TransferTimeoutError
from engine_plugins.sender.engines import EngineLink
from engine_plugins.sender.fleet import Fleet
from engine_plugins.sender.peer_writes import PeerWrites
from engine_plugins.sender.push_report import WriteCost
from engine_plugins.sender.ranks import TrainerRanks
from engine_plugins.weights.contract.destinations import Destination, Writes
from engine_plugins.weights.contract.report import PlanSummary
from engine_plugins.weights.peers.meeting import Greeting, meet_agent
from engine_plugins.weights.transport.base import Transport
from engine_plugins.weights.transport.transfers import run_transfers

__all__ = ["Push"]

MARGIN = 0.05
"""Share of the time left that writes leave to the commit: past the deadline engines give up."""


class _Share(msgspec.Struct, frozen=True, kw_only=True):
    """One trainer rank's part of an engine's plan: it may be as large as the rank's weights."""

    plan_id: str
    destinations: list[Destination]
    """With the writes of this rank alone."""


@dataclass(frozen=True, kw_only=True)
class _Target:
    """One engine's plan, and this rank's writes for it."""

    plan_id: str
    peers: list[PeerWrites]


class Push:
    """This process's part in the pushes of a job; its methods are collective.

    Args:
        ranks: the processes that push together.
        transport: the agent that the weights are registered with.

    Attributes:
        ended: whether no rank's write of the last push can be under way.
        costs: what the last push took of each rank.
    """

    def __init__(self, ranks: TrainerRanks, transport: Transport) -> None:
        self._ranks = ranks
        self._transport = transport
        self._targets: dict[str, _Target] = {}
        self.ended = True
        self.costs: list[WriteCost] = []

    def run(self, fleet: Fleet, urls: Sequence[str], *, deadline: float) -> None:
        """Write to engines. Writes are prepared once for each plan.

        Args:
            fleet: the engines; the leading rank's links have the plans that were prepared.
            urls: of the engines that have prepared.
            deadline: when the first engine gives up, on the monotonic clock.

        Raises:
            PeerError: an engine's description or memory is refused.
            PeerLostError: an engine rank died.
            TransferTimeoutError: the deadline passed; writes are still under way if it is `stuck`.
        """
        self.ended, self.costs = True, []
        try:
            for url in set(self._targets) - set(fleet.urls):
                self._forget(url)
            news = partial(self._news, fleet.links, urls)
            new = self._ranks.lead("looking for new plans", news, list[str])
            if new:
                self._learn_all(fleet.links, new)
            self._write(urls, deadline)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release what is prepared; the next push begins anew."""
        for url in list(self._targets):
            self._forget(url)

    def _news(self, links: Mapping[str, EngineLink], urls: Sequence[str]) -> list[str]:
        """Engines whose plans the ranks have not been told of."""
        plans = {url: links[url].plan for url in urls}
        return [
            url
            for url, plan in plans.items()
            if plan is not None and self._plan_id(url) != plan.plan_id
        ]

    def _learn_all(self, links: Mapping[str, EngineLink], urls: Sequence[str]) -> None:
        """Give each rank its own writes, and have it prepare them."""
        agents = self._ranks.agree("naming the agents", lambda: self._transport.agent, str)

        def shares() -> list[dict[str, _Share]]:
            plans = {url: links[url].plan for url in urls}
            return [
                {url: _share(plan, agent) for url, plan in plans.items() if plan is not None}
                for agent in agents
            ]

        mine = self._ranks.deal("sharing the engines' plans", shares, dict[str, _Share])
        self._ranks.agree("meeting the engines", partial(self._learn, mine), None)

    def _plan_id(self, url: str) -> str | None:
        target = self._targets.get(url)
        return None if target is None else target.plan_id

    def _learn(self, plans: Mapping[str, _Share]) -> None:
        for url, plan in plans.items():
            self._forget(url)
            target = self._targets[url] = _Target(plan_id=plan.plan_id, peers=[])
            for destination in plan.destinations:
                mine = destination.writes.get(self._transport.agent)
                if mine is not None:
                    who = f"rank {destination.tp_rank} of {url}"
                    peer = PeerWrites(who, destination.agent, self._transport)
                    # Kept before it is full: what a failure leaves prepared is released with it.
                    target.peers.append(peer)
                    self._prepare(peer, destination, mine)

    def _prepare(self, peer: PeerWrites, destination: Destination, mine: Writes) -> None:
        """Meet one engine rank and prepare what is written to it."""
        agent, metadata = destination.agent, destination.agent_metadata
        if hashlib.sha256(metadata).hexdigest() != destination.agent_metadata_sha256:
            raise PeerError(
                f"the description of {peer.who} (agent {agent}) has "
                f"{len(metadata)} bytes and another checksum than was told with it",
                remedy="look for a proxy that changes answers, and update again",
            )
        met = False
        for local_device, remote_device, rows in mine.by_devices():
            if not met:
                greeting = Greeting(
                    address=int(rows[0, 1]), nbytes=int(rows[0, 2]), device=remote_device
                )
                meet_agent(self._transport, agent, metadata, greeting=greeting, who=peer.who)
                met = True
            peer.add(rows, local_device=local_device, remote_device=remote_device)

    def _write(self, urls: Sequence[str], deadline: float) -> None:
        targets = [self._targets[url] for url in urls if url in self._targets]
        peers = [peer for target in targets for peer in target.peers]
        failure: BaseException | None = None
        self.ended = False
        cost = WriteCost()
        try:
            cost = _written(peers, deadline)
        except BaseException as error:  # whatever it is, the other ranks wait to hear of it
            failure = error
            left = [peer.progress() for peer in peers if peer.unfinished]
            if isinstance(error, EnginePluginError):
                error.message += f"; not written in full: {'; '.join(left[:8])}"
        stopped = not (isinstance(failure, TransferTimeoutError) and failure.stuck)
        if not stopped and failure is not None and _is_interrupt(failure.__cause__):
            failure = failure.__cause__
        self.ended = all(self._ranks.agree("ending the writes", lambda: stopped, bool))

        def outcome() -> WriteCost:
            if failure is not None:
                raise failure
            return cost

        self.costs = self._ranks.agree("writing the weights", outcome, WriteCost)

    def _forget(self, url: str) -> None:
        target = self._targets.pop(url, None)
        for peer in target.peers if target is not None else ():
            peer.release(ended=self.ended)


def _share(plan: PlanSummary, agent: str) -> _Share:
    return _Share(
        plan_id=plan.plan_id,
        destinations=[
            msgspec.structs.replace(each, writes={agent: each.writes[agent]})
            for each in plan.destinations
            if agent in each.writes
        ],
    )


def _is_interrupt(error: BaseException | None) -> bool:
    return error is not None and not isinstance(error, Exception)


def _written(peers: Sequence[PeerWrites], deadline: float) -> WriteCost:
    """Write everything; what it took is read before anything is given back or counted anew."""
    began = time.perf_counter()
    for peer in peers:
        peer.begin()
    gathered = time.perf_counter()
    writes = [write for peer in peers for write in peer.writes]
    left = (deadline - time.monotonic()) * (1 - MARGIN)
    nbytes = run_transfers(writes, deadline_s=max(left, 0.0))
    ended = time.perf_counter()
    posted_s = sum(write.posted_s for write in writes)
    return WriteCost(
        bytes=nbytes,
        writes=len(writes),
        ranges=sum(peer.ranges for peer in peers),
        gathered=sum(peer.gathered for peer in peers),
        gathered_s=gathered - began,
        posted_s=posted_s,
        waited_s=ended - gathered - posted_s,
    )
