"""What the admin routes do, once a request is known to be allowed and well-formed."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec

from engine_plugins.admin.engine_control import EngineControl, RequestCounts
from engine_plugins.admin.pausing import pause_within
from engine_plugins.admin.schemas import (
    ConnectBody,
    EngineView,
    FlushBody,
    PauseBody,
    RequestsView,
    StateView,
    UpdateBody,
    WeightsView,
    WorkerView,
)
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import EngineState, Pause, moved, require
from engine_plugins.admin.update_answers import UpdateAnswers
from engine_plugins.admin.update_transaction import UpdateTransaction
from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.errors import (
    ConflictError,
    EnginePluginError,
    StaleVersionError,
    UnknownIdError,
    UnsupportedError,
    WeightMismatchError,
)
from engine_plugins.settings import Settings
from engine_plugins.weights.manifest import SourceManifest, decode_manifest, encode_manifest
from engine_plugins.weights.model_facts import compare_facts
from engine_plugins.weights.report import PlanSummary, UpdateReport
from engine_plugins.weights.worker_service import ConnectAnswer, WorkerDescription

__all__ = ["AdminService"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_SOURCES = 4096
MAX_PLANS = 8
BUSY_WAIT_S = 0.05
"""How long /state waits for an engine that may be busy; what it has not said then is unknown."""
RETRY_S = 0.05

_SOURCE_ID = re.compile(r"source-[0-9a-f]{24}")


class AdminService:
    """The admin contract over one engine, in one of its API processes."""

    def __init__(self, control: EngineControl, shared: SharedState, settings: Settings) -> None:
        self._control = control
        self._shared = shared
        self._settings = settings
        self._workers = WorkerCalls(control)
        self._answers = UpdateAnswers(shared)
        self._describing: asyncio.Task[list[WorkerDescription]] | None = None
        self._counting: asyncio.Task[RequestCounts] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def state_name(self) -> str:
        """The state's name, for error answers."""
        return self._shared.read().state

    async def state(self) -> StateView:
        """Everything about the engine that can be said at once."""
        state = self._shared.read()
        counts = await self._request_counts()
        info = self._control.info
        plain = msgspec.to_builtins(state)
        del plain["kv_generation"], plain["holding"]
        return StateView(
            engine=EngineView(
                kind=info.kind,
                version=info.version,
                plugin_version=info.plugin_version,
                model=info.model,
                tensor_parallel_size=info.tensor_parallel_size,
                pipeline_parallel_size=info.pipeline_parallel_size,
            ),
            requests=RequestsView(running=counts.running, waiting=counts.waiting),
            workers=await self._worker_views(state),
            **plain,
        )

    async def pause(self, body: PauseBody) -> StateView:
        """Stop scheduling, and say so in the state."""
        await self._to_the_end(self._pause(body))
        return await self.state()

    async def _pause(self, body: PauseBody) -> None:
        with self._shared.operation("pause"):
            state = self._shared.read()
            require(state, "serving", "paused", doing="pause")
            if state.pause is not None and state.pause.mode != body.mode:
                raise ConflictError(
                    f"cannot pause with mode {body.mode}: already paused with mode "
                    f"{state.pause.mode}",
                    remedy="POST /admin/v1/resume first",
                )
            if state.state == "serving":
                await pause_within(self._control, body.mode, body.timeout_s)
            until = None if body.hold_s is None else time.time() + body.hold_s
            pause = Pause(mode=body.mode, until=until)
            self._shared.change(lambda now: moved(now, "paused", pause=pause))
        if body.hold_s is not None:
            self._keep(asyncio.create_task(self._end_pause(pause, body.hold_s)))

    async def resume(self) -> StateView:
        """Schedule again."""
        with self._shared.operation("resume"):
            state = self._shared.read()
            require(state, "serving", "paused", doing="resume")
            if state.state == "paused":
                await self._control.resume()
                self._shared.change(lambda now: moved(now, "serving", pause=None))
        return await self.state()

    async def flush(self, body: FlushBody) -> list[str]:
        """Empty caches, whatever the engine is doing short of an update."""
        with self._shared.operation("flush"):
            require(self._shared.read(), "serving", "paused", doing="flush")
            return await self._control.flush(
                prefix_cache=body.prefix_cache, multimodal_cache=body.multimodal_cache
            )

    async def add_source(self, body: bytes, content_type: str) -> str:
        """Hold a trainer process's manifest; the same manifest has the same id."""
        manifest = await asyncio.to_thread(
            decode_manifest,
            body,
            content_type=content_type,
            max_entries=self._settings.max_manifest_entries,
        )
        plain = await asyncio.to_thread(encode_manifest, manifest)
        source_id = "source-" + hashlib.sha256(plain).hexdigest()[:24]
        self._shared.put("sources", source_id, plain)
        self._prune("sources", MAX_SOURCES)
        return source_id

    async def connect(self, body: ConnectBody) -> PlanSummary:
        """Plan an update from sources, on every rank, and meet the peers."""
        if body.direction == "push":
            raise UnsupportedError(
                "direction push is not built yet", remedy="connect with direction pull"
            )
        with self._shared.operation("connect"):
            require(self._shared.read(), "serving", "paused", "fenced", doing="connect")
            manifests = self._manifests(body)
            plan_id = "plan-" + secrets.token_hex(8)
            try:
                answers = await self._workers.connect(plan_id, manifests)
                _refuse_unused(answers)
            except EnginePluginError:
                await self._workers.drop(plan_id)
                raise
            plan = _summary(plan_id, answers)
            self._shared.put("plans", plan_id, msgspec.json.encode(plan))
            for old in self._shared.names("plans")[:-MAX_PLANS]:
                await self._workers.drop(old)
                self._shared.drop("plans", old)
                self._shared.drop("used", old)
        return plan

    async def update(self, body: UpdateBody) -> UpdateReport:
        """Install new weights; a request_id that was answered before is answered again.

        Raises:
            StoredFailure: this request_id failed before.
            EnginePluginError: see UpdateTransaction.run.
        """
        if body.verify != "none":
            raise UnsupportedError(
                f"verify {body.verify} is not built yet", remedy="update with verify none"
            )
        given = self._answers.again(body)
        return given if given is not None else await self._to_the_end(self._update(body))

    def weights(self) -> WeightsView:
        """The version that serves, past reports and known plans."""
        plans = [self._shared.get("plans", name) for name in self._shared.names("plans")]
        return WeightsView(
            version=self._shared.read().weights.version,
            history=self._answers.reports(),
            plans=[msgspec.json.decode(plan) for plan in plans if plan is not None],
        )

    async def _update(self, body: UpdateBody) -> UpdateReport:
        with self._shared.operation("update"):
            # The same request may have been answered while this one came to the lock.
            given = self._answers.again(body)
            if given is not None:
                return given
            plan = self._plan(body.plan_id)
            state = self._shared.read()
            require(state, "serving", "paused", "fenced", doing="update")
            _refuse_stale(state, body)
            if body.plan_id in self._shared.names("used"):
                plan = msgspec.structs.replace(plan, connect_s=0.0, plan_s=0.0)
            self._shared.put("used", body.plan_id, b"")
            transaction = UpdateTransaction(
                self._control, self._shared, body, plan, staged=self._staged(body, plan)
            )
            return await self._carry_through(transaction)

    async def _carry_through(self, transaction: UpdateTransaction) -> UpdateReport:
        try:
            report = await transaction.run()
        except EnginePluginError as error:
            self._answers.keep(transaction.failure_report(error), error)
            raise
        self._answers.keep(report)
        return report

    def _staged(self, body: UpdateBody, plan: PlanSummary) -> bool:
        if body.mode == "auto":
            largest = max(rank.bytes_needed for rank in plan.ranks)
            return 0 < largest <= self._settings.staging_bytes
        return body.mode == "staged"

    def _manifests(self, body: ConnectBody) -> list[bytes]:
        bodies: list[bytes] = []
        agents: set[str] = set()
        for source_id in dict.fromkeys(body.source_ids):
            ours = _SOURCE_ID.fullmatch(source_id)
            kept = self._shared.get("sources", source_id) if ours else None
            if kept is None:
                raise UnknownIdError(
                    f"no source {source_id[:80]!r} here", remedy="POST its manifest again"
                )
            manifest = msgspec.msgpack.decode(kept, type=SourceManifest)
            compare_facts(manifest.model, self._control.info.model_facts, who=manifest.source)
            if manifest.agent in agents:
                raise WeightMismatchError(
                    f"two sources say they are the agent {manifest.agent}",
                    remedy="publish one manifest for each trainer process",
                )
            agents.add(manifest.agent)
            bodies.append(kept)
        compare_facts(body.model, self._control.info.model_facts, who="the connect call")
        return bodies

    def _plan(self, plan_id: str) -> PlanSummary:
        kept = (
            self._shared.get("plans", plan_id) if plan_id in self._shared.names("plans") else None
        )
        if kept is None:
            raise UnknownIdError(f"no plan {plan_id[:80]!r} here", remedy="connect again")
        return msgspec.json.decode(kept, type=PlanSummary)

    async def _request_counts(self) -> RequestCounts:
        """Ask the engine, but do not wait for a busy one, nor ask it twice at a time."""
        task = self._counting
        if task is None or task.done():
            task = self._counting = asyncio.create_task(self._control.request_counts())
            self._keep(task)
        await asyncio.wait({task}, timeout=BUSY_WAIT_S)
        if not task.done() or task.exception() is not None:
            return RequestCounts(running=None, waiting=None)
        return task.result()

    async def _worker_views(self, state: EngineState) -> list[WorkerView]:
        """Who the workers are; asked once, not during an update, and not waited for too long."""
        task = self._describing
        if task is None or (task.done() and task.exception() is not None):
            if state.state == "updating":
                return []
            task = self._describing = asyncio.create_task(self._workers.describe())
            self._keep(task)
        await asyncio.wait({task}, timeout=BUSY_WAIT_S)
        if not task.done() or task.exception() is not None:
            return []
        return [
            WorkerView(tp_rank=each.tp_rank, pid=each.pid, host=each.host) for each in task.result()
        ]

    def _prune(self, folder: str, most: int) -> None:
        for name in self._shared.names(folder)[:-most]:
            self._shared.drop(folder, name)

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Work in a task of its own: a client that hangs up must not stop it half way."""
        task = asyncio.create_task(work)
        self._keep(task)
        return await asyncio.shield(task)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        """Keep a task that nobody may be waiting for; the loop itself holds it only weakly."""
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked was told; asyncio need not complain

    async def _end_pause(self, pause: Pause, hold_s: float) -> None:
        """End a pause whose holder said how long to hold it, if it is still that pause.

        An update may be under way just then: the pause ends when that has.
        """
        await asyncio.sleep(hold_s)
        while self._shared.read().pause == pause:
            try:
                await self.resume()
            except ConflictError:
                await asyncio.sleep(RETRY_S)
            except EnginePluginError:
                logger.exception("a pause of %g s could not be ended", hold_s)
                return


def _summary(plan_id: str, answers: list[ConnectAnswer]) -> PlanSummary:
    ranks = [answer.plan for answer in answers]

    def total(field: Callable[[Any], int]) -> int:
        return sum(field(rank) for rank in ranks)

    return PlanSummary(
        plan_id=plan_id,
        direction="pull",
        bytes_needed=total(lambda rank: rank.bytes_needed),
        bytes_to_move=total(lambda rank: rank.bytes_to_move),
        operations=total(lambda rank: rank.operations),
        direct_bytes=total(lambda rank: rank.direct_bytes),
        staged_bytes=total(lambda rank: rank.staged_bytes),
        loader_bytes=total(lambda rank: rank.loader_bytes),
        connect_s=max(answer.connect_s for answer in answers),
        plan_s=max(answer.plan_s for answer in answers),
        ranks=ranks,
    )


def _refuse_unused(answers: list[ConnectAnswer]) -> None:
    unused = set.intersection(*(set(answer.unused) for answer in answers))
    if unused:
        shown = ", ".join(sorted(unused)[:8])
        raise WeightMismatchError(
            f"{len(unused)} tensors reach no parameter of the engine's model: {shown}",
            remedy="publish the tensors of the model that this engine serves, and no others",
        )


def _refuse_stale(state: EngineState, body: UpdateBody) -> None:
    if body.force:
        return
    if state.fence is not None:
        if body.version < state.fence.attempted_version:
            raise StaleVersionError(
                f"version {body.version} is older than {state.fence.attempted_version}, whose "
                "update failed half way",
                remedy="repeat that version or send a newer one, or set force",
            )
    elif state.weights.version is not None and body.version <= state.weights.version:
        raise StaleVersionError(
            f"version {body.version} is not newer than the installed {state.weights.version}",
            remedy="send a newer version, or set force",
        )
