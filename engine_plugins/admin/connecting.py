"""An engine's two ends of weights on their way: plans from sources, and its own weights as one.

The caller of each method holds the operation lock, and has seen that the state allows it.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import msgspec

from engine_plugins.admin.bounded_control import BoundedControl
from engine_plugins.admin.plans import Plans
from engine_plugins.admin.schemas import ConnectBody
from engine_plugins.admin.sources import Sources
from engine_plugins.admin.state import WeightsInstalled
from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.admin_answers import EngineOffer
from engine_plugins.errors import ConflictError, EnginePluginError, WeightMismatchError
from engine_plugins.weights.boxes.model_facts import compare_facts
from engine_plugins.weights.contract.report import PlanSummary
from engine_plugins.weights.receiving.worker_messages import ConnectAnswer

__all__ = ["Connecting"]


class Connecting:
    """What an engine is connected to, and what it offers to others.

    Args:
        control: the engine.
        sources: the manifests that trainers have sent.
        plans: those that the engine holds.
    """

    def __init__(self, control: BoundedControl, sources: Sources, plans: Plans) -> None:
        self._control = control
        self._workers = WorkerCalls(control)
        self._sources = sources
        self._plans = plans

    async def connect(self, body: ConnectBody, reached_at: str | None) -> PlanSummary:
        """Plan an update from sources, on every rank, and meet the peers.

        Args:
            body: the call.
            reached_at: this server's address, as the caller sees it.

        Returns:
            The plan; or none, where the body asks for dtypes and tensors want others.
        """
        # An engine that lacks our methods says so here, not in the update that needs them.
        await self._control.request_counts()
        facts = self._control.info.model_facts
        manifests = await asyncio.to_thread(self._sources.paths, body.source_ids, facts)
        compare_facts(body.model, facts, who="the connect call")
        plan_id = "plan-" + secrets.token_hex(8)
        try:
            answers = await self._workers.connect(
                plan_id,
                manifests,
                direction=body.direction,
                reached_at=reached_at,
                tell_dtypes=body.tell_dtypes,
            )
            _refuse_unused(answers)
        except EnginePluginError:
            with suppress(EnginePluginError):
                await WorkerCalls(self._control.closing()).drop(plan_id)
            raise
        wanted = _wanted(answers)
        if wanted:
            await self._workers.drop(plan_id)  # ranks that want nothing else have made it
            none = _summary("", body.direction, [])
            return msgspec.structs.replace(none, wanted=wanted)
        plan = _summary(plan_id, body.direction, answers)
        dropped = self._plans.add(plan)
        for old in dropped:
            await self._workers.drop(old)
        await asyncio.to_thread(self._sources.planned, plan_id, body.source_ids, dropped)
        return plan

    async def offer(self, weights: WeightsInstalled, reached_at: str | None) -> EngineOffer:
        """The weights that serve, as a source for other engines.

        Args:
            weights: what the state says of them.
            reached_at: this server's address, as the caller sees it.

        Raises:
            ConflictError: no update of ours has been installed, or an engine's parameters do not
                hold what its loader copies; the text names them.
        """
        if weights.version is None:
            raise ConflictError(
                "this engine holds the weights that it was started with: where they lie is "
                "known once an update has installed others",
                remedy="update this engine first",
            )
        word = _word_of(weights)
        facts = self._control.info.model_facts
        manifests = await self._workers.manifests(facts, word, reached_at=reached_at)
        return EngineOffer(
            version=weights.version,
            request_id=weights.request_id,
            manifests=manifests,
            source_word=word,
        )


def _summary(
    plan_id: str, direction: Literal["pull", "push"], answers: list[ConnectAnswer]
) -> PlanSummary:
    ranks = [answer.plan for answer in answers]

    def total(field: Callable[[Any], int]) -> int:
        return sum(field(rank) for rank in ranks)

    return PlanSummary(
        plan_id=plan_id,
        direction=direction,
        bytes_needed=total(lambda rank: rank.bytes_needed),
        bytes_to_move=total(lambda rank: rank.bytes_to_move),
        operations=total(lambda rank: rank.operations),
        direct_bytes=total(lambda rank: rank.direct_bytes),
        staged_bytes=total(lambda rank: rank.staged_bytes),
        loader_bytes=total(lambda rank: rank.loader_bytes),
        connect_s=max((answer.connect_s for answer in answers), default=0.0),
        plan_s=max((answer.plan_s for answer in answers), default=0.0),
        ranks=ranks,
        destinations=[each.destination for each in answers if each.destination is not None],
    )


def _wanted(answers: list[ConnectAnswer]) -> dict[str, list[str]]:
    """By dtype, the tensors that any rank wants in it."""
    wanted: dict[str, dict[str, None]] = {}
    for answer in answers:
        for dtype, names in answer.wanted.items():
            wanted.setdefault(dtype, {}).update(dict.fromkeys(names))
    return {dtype: list(names) for dtype, names in wanted.items()}


def _refuse_unused(answers: list[ConnectAnswer]) -> None:
    unused = set.intersection(*(set(answer.unused) for answer in answers))
    if unused:
        shown = ", ".join(sorted(unused)[:8])
        raise WeightMismatchError(
            f"{len(unused)} tensors reach no parameter of the engine's model: {shown}",
            remedy="publish the tensors of the model that this engine serves, and no others",
        )
    if not any(answer.plan.bytes_needed or answer.wanted for answer in answers):
        raise WeightMismatchError(
            "nothing of what is offered has a place in the engine's model (an output head that is "
            "its embedding, or layers that only a draft model has): no weight would change",
            remedy="send tensors that this engine serves; of a tied model the embedding",
        )


def _word_of(weights: WeightsInstalled) -> int:
    """The version word of installed weights: the same for whoever asks, another for others."""
    said = f"{weights.version} {weights.request_id} {weights.installed_at}"
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:6], "little") + 1
