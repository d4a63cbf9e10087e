"""Calls to every worker of the engine, as the update transaction makes them."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from engine_plugins.admin.bounded_control import BoundedControl
from engine_plugins.admin.engine_control import EngineControl
from engine_plugins.errors import EnginePluginError
from engine_plugins.weights.contract.report import RankReport
from engine_plugins.weights.receiving.staging import StagingRoom
from engine_plugins.weights.receiving.worker_messages import (
    GENERATION,
    AbortAnswer,
    ConnectAnswer,
    StatusAnswer,
    WorkerDescription,
    encode_call,
    raised,
    read_answer,
)

__all__ = ["WorkerCalls"]

T = TypeVar("T")


class WorkerCalls:
    """Every rank is asked and every answer read before any error is raised.

    A call says of which generation it is, so that no rank obeys a process whose place another one
    has taken.
    """

    def __init__(self, control: EngineControl) -> None:
        self._control = control
        self._shared = control.shared if isinstance(control, BoundedControl) else None

    def _encoded(self, arguments: Mapping[str, Any]) -> bytes:
        if self._shared is None:
            return encode_call(**arguments)
        return encode_call(**{**arguments, GENERATION: self._shared.generation})

    async def describe(self) -> list[WorkerDescription]:
        """Who the workers are."""
        return await self.ask("describe", WorkerDescription)

    async def connect(
        self,
        plan_id: str,
        manifests: Sequence[Path],
        *,
        direction: Literal["pull", "push"],
        reached_at: str | None = None,
        tell_dtypes: bool = False,
    ) -> list[ConnectAnswer]:
        """Plan on every rank. Ranks of this host read the manifests themselves.

        Args:
            plan_id: of the plan.
            manifests: of the sources.
            direction: who moves the bytes.
            reached_at: this server's address, as the caller sees it; ranks listen there. Of
                another host's ranks loopback says nothing.
            tell_dtypes: say which dtypes tensors should have, instead of refusing them.
        """
        hosts = {worker.host for worker in await self.describe()}
        here = hosts == {socket.gethostname()}
        offers = list(map(str, manifests)) if here else await asyncio.to_thread(_read, manifests)
        return await self.ask(
            "connect",
            ConnectAnswer,
            plan_id=plan_id,
            manifests=offers,
            direction=direction,
            reached_at=reached_at if here or not _is_loopback(reached_at) else None,
            **({"tell_dtypes": True} if tell_dtypes else {}),
        )

    async def manifests(
        self, model: Mapping[str, str | int | bool], word: int, *, reached_at: str | None = None
    ) -> list[bytes]:
        """What every rank offers to other engines, as msgpack, under a version word."""
        return await self.ask(
            "manifest", bytes, model=dict(model), word=word, reached_at=reached_at
        )

    async def drop(self, plan_id: str) -> None:
        """Forget a plan on every rank; a rank that cannot now will when the next one comes."""
        await self._control.call_workers("drop", self._encoded({"plan_id": plan_id}))

    async def staging_room(self, plan_id: str) -> list[StagingRoom]:
        """What it would take every rank to stage the plan's next update."""
        return await self.ask("staging_room", StagingRoom, plan_id=plan_id)

    async def start(
        self, plan_id: str, *, staged: bool, timeout_s: float, word: int | None
    ) -> list[StatusAnswer]:
        """Begin to pull on every rank, or make the memory ready that a push writes to."""
        return await self._statuses(
            "start", plan_id=plan_id, staged=staged, timeout_s=timeout_s, word=word
        )

    async def confirm(self) -> list[StatusAnswer]:
        """See on every rank that what was read has not been taken back."""
        return await self._statuses("confirm")

    async def look(self) -> list[StatusAnswer]:
        """See on every rank whether the trainers are there, while an update waits to be committed.

        Raises:
            PeerLostError: one is gone.
            SourceRevokedError: one took its offer back.
        """
        return await self._statuses("look")

    async def poll(self) -> list[StatusAnswer]:
        """Where every rank stands. Raises the first rank's failure."""
        return await self._statuses("poll")

    async def written(self) -> list[StatusAnswer]:
        """Tell every rank that the trainer has written every byte of a push."""
        return await self._statuses("written")

    async def advance(self, *, budget_s: float) -> list[StatusAnswer]:
        """Install what is here on every rank."""
        return await self._statuses("advance", budget_s=budget_s)

    async def finish(self, *, keep_kv: bool) -> list[RankReport]:
        """End the load on every rank.

        Args:
            keep_kv: whether requests go on with the KV that they have.
        """
        arguments = {"keep_kv": True} if keep_kv else {}
        return await self.ask("finish", RankReport, **arguments)

    async def abort(self, *, writes_ended: bool | None = None) -> AbortAnswer:
        """Give up on every rank; what may have become of live weights on any of them.

        A rank that cannot say counts as touched.

        Args:
            writes_ended: of a push, whether its trainer is known to write no more.
        """
        arguments = {} if writes_ended is None else {"writes_ended": writes_ended}
        wrote = lost = False
        for body in await self._control.call_workers("abort", self._encoded(arguments)):
            try:
                answer = read_answer(body, AbortAnswer)
            except EnginePluginError:
                wrote = True
            else:
                wrote, lost = answer.wrote or wrote, answer.lost or lost
        return AbortAnswer(wrote=wrote, lost=lost)

    async def _statuses(self, call: str, **arguments: Any) -> list[StatusAnswer]:
        statuses = await self.ask(call, StatusAnswer, **arguments)
        for status in statuses:
            if status.failure is not None:
                raise raised(status.failure)
        return statuses

    async def ask(self, call: str, kind: type[T], **arguments: Any) -> list[T]:
        """Make one call of every rank.

        Raises:
            EnginePluginError: the first failure, once every rank has answered.
        """
        bodies = await self._control.call_workers(call, self._encoded(arguments))
        answers: list[T] = []
        failures: list[EnginePluginError] = []
        for body in bodies:
            try:
                answers.append(read_answer(body, kind))
            except EnginePluginError as error:
                failures.append(error)
        if failures:
            if len(failures) < len(bodies):
                failures[0].message += f" (the other {len(bodies) - len(failures)} ranks are well)"
            raise failures[0]
        return answers


def _read(paths: Sequence[Path]) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def _is_loopback(address: str | None) -> bool:
    try:
        return address is not None and ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
