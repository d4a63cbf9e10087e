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

from engine_plugins.errors import EnginePluginError, PeerError, TransferTimeoutError
from engine_plugins.sender.engines import EngineLink
from engine_plugins.sender.ranks import TrainerRanks
from engine_plugins.weights.destinations import Destination, Writes
from engine_plugins.weights.report import PlanSummary
from engine_plugins.weights.transport.base import PreparedTransfer, Transport
from engine_plugins.weights.transport.meeting import Greeting, meet_agent
from engine_plugins.weights.transport.transfers import run_transfers

__all__ = ["Push"]

MARGIN = 0.05
"""Share of the time left that writes leave to the commit: past the deadline engines give up."""


@dataclass(frozen=True, kw_only=True)
class _Target:
    """One engine's plan, and this rank's writes for it."""

    plan_id: str
    writes: Sequence[PreparedTransfer]


class Push:
    """This process's part in the pushes of a job; its methods are collective.

    Args:
        ranks: the processes that push together.
        transport: the agent that the weights are registered with.

    Attributes:
        ended: whether no rank's write of the last push can be under way.
    """

    def __init__(self, ranks: TrainerRanks, transport: Transport) -> None:
        self._ranks = ranks
        self._transport = transport
        self._targets: dict[str, _Target] = {}
        self.ended = True

    def run(self, links: Mapping[str, EngineLink], *, deadline: float) -> None:
        """Write to every engine. Writes are prepared once for each plan.

        Args:
            links: the engines by url; the leading rank's have the plans that were prepared.
            deadline: when the first engine gives up, on the monotonic clock.

        Raises:
            PeerError: an engine's description or memory is refused.
            PeerLostError: an engine rank died.
            TransferTimeoutError: the deadline passed; writes may still be under way.
        """
        self.ended = True
        try:
            news = partial(self._news, links)
            plans = self._ranks.lead("sharing the engines' plans", news, dict[str, PlanSummary])
            self._ranks.agree("meeting the engines", partial(self._learn, plans), None)
            self._write(deadline)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release what is prepared; the next push begins anew."""
        for url in list(self._targets):
            self._forget(url)

    def _news(self, links: Mapping[str, EngineLink]) -> dict[str, PlanSummary]:
        """Plans that the ranks have not been told of."""
        return {
            url: link.plan
            for url, link in links.items()
            if link.plan is not None and self._plan_id(url) != link.plan.plan_id
        }

    def _plan_id(self, url: str) -> str | None:
        target = self._targets.get(url)
        return None if target is None else target.plan_id

    def _learn(self, plans: Mapping[str, PlanSummary]) -> None:
        for url, plan in plans.items():
            self._forget(url)
            writes: list[PreparedTransfer] = []
            # Kept before it is full: what a failure leaves prepared is released with it.
            self._targets[url] = _Target(plan_id=plan.plan_id, writes=writes)
            for destination in plan.destinations:
                mine = destination.writes.get(self._transport.agent)
                if mine is not None:
                    self._prepare(url, destination, mine, writes)

    def _prepare(
        self, url: str, destination: Destination, mine: Writes, writes: list[PreparedTransfer]
    ) -> None:
        """Meet one engine rank and prepare what is written to it."""
        agent, metadata = destination.agent, destination.agent_metadata
        if hashlib.sha256(metadata).hexdigest() != destination.agent_metadata_sha256:
            raise PeerError(
                f"the description of rank {destination.tp_rank} of {url} (agent {agent}) has "
                f"{len(metadata)} bytes and another checksum than was told with it",
                remedy="look for a proxy that changes answers, and update again",
            )
        met = False
        for local_device, remote_device, rows in mine.by_devices():
            if not met:
                greeting = Greeting(
                    address=int(rows[0, 1]), nbytes=int(rows[0, 2]), device=remote_device
                )
                who = f"rank {destination.tp_rank} of {url}"
                meet_agent(self._transport, agent, metadata, greeting=greeting, who=who)
                met = True
            writes.append(
                self._transport.prepare_write(
                    agent, rows, local_device=local_device, remote_device=remote_device
                )
            )

    def _write(self, deadline: float) -> None:
        writes = [write for target in self._targets.values() for write in target.writes]
        failure: Exception | None = None
        self.ended = False
        try:
            left = (deadline - time.monotonic()) * (1 - MARGIN)
            run_transfers(writes, deadline_s=max(left, 0.0))
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            failure = error
        stopped = failure is None or (
            isinstance(failure, EnginePluginError) and not isinstance(failure, TransferTimeoutError)
        )
        self.ended = all(self._ranks.agree("ending the writes", lambda: stopped, bool))

        def outcome() -> None:
            if failure is not None:
                raise failure

        self._ranks.agree("writing the weights", outcome, None)

    def _forget(self, url: str) -> None:
        target = self._targets.pop(url, None)
        for write in target.writes if target is not None else ():
            write.release()
