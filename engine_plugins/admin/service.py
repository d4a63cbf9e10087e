"""What the admin routes do, once a request is known to be allowed and well-formed."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

import msgspec

from engine_plugins.admin.absent_parts import absent_parts
from engine_plugins.admin.background import Background
from engine_plugins.admin.bounded_control import bounded
from engine_plugins.admin.engine_control import EngineControl, RequestCounts
from engine_plugins.admin.pausing import end_left_pause, new_pause, pause_within
from engine_plugins.admin.plans import Plans
from engine_plugins.admin.schemas import (
    AbortBody,
    AbsentView,
    CommitBody,
    ConnectBody,
    EngineView,
    FlushBody,
    GateBody,
    GateView,
    PauseBody,
    RequestsView,
    SleepAnswer,
    SleepBody,
    StateView,
    UpdateBody,
    WakeBody,
    WeightsView,
    WorkerView,
)
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.sleeping import Sleeping, memory_answer, residual_memory
from engine_plugins.admin.sources import Sources
from engine_plugins.admin.state import (
    EngineState,
    WeightsInstalled,
    moved,
    require,
    require_weights_mapped,
)
from engine_plugins.admin.updates import MOST_WAIT_S, Updates
from engine_plugins.admin.watcher import Watcher
from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.admin_answers import EngineOffer
from engine_plugins.errors import (
    ConflictError,
    EnginePluginError,
    RefusedSettingError,
    SettingsError,
    WeightMismatchError,
)
from engine_plugins.prefill_gate.gate_report import GateReport
from engine_plugins.settings import Settings
from engine_plugins.sleep.memory_report import ResidualReport
from engine_plugins.weights.model_facts import compare_facts
from engine_plugins.weights.report import PlanSummary, UpdateReport
from engine_plugins.weights.worker_service import (
    ConnectAnswer,
    WorkerDescription,
    encode_call,
    read_answer,
)

__all__ = ["AdminService"]

logger = logging.getLogger(__name__)

BUSY_WAIT_S = 0.05
"""How long /state waits for an engine that may be busy; what it has not said then is unknown."""
WAIT_S = 5.0
"""How long a call waits for another to end."""


class AdminService:
    """The admin contract over one engine, in one of its API processes."""

    def __init__(self, control: EngineControl, shared: SharedState, settings: Settings) -> None:
        self._control = bounded(control, shared)
        self._shared = shared
        self._workers = WorkerCalls(self._control)
        self._reading = asyncio.Lock()
        """One manifest at a time: each thread that computes makes the event loop wait its turn."""
        self._sources = Sources(shared.runtime_dir, max_entries=settings.max_manifest_entries)
        self._plans = Plans(shared)
        self._background = Background()
        self._updates = Updates(self._control, shared, settings, self._background)
        self._sleeping = Sleeping(self._control, shared, settings)
        self.watcher = Watcher(self._control, shared, self._updates.left)
        """Runs for as long as the application does, see `late_admin`."""
        self._describing: asyncio.Task[list[WorkerDescription]] | None = None
        self._counting: asyncio.Task[RequestCounts] | None = None

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
        del plain["kv_life"], plain["kv_generation"], plain["holding"]
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
            absent=[
                AbsentView(part=part, reason=reason)
                for part, reason in absent_parts(self._shared.runtime_dir).items()
            ],
            **plain,
        )

    async def pause(self, body: PauseBody) -> StateView:
        """Stop scheduling, and say so in the state."""
        await self._background.to_the_end(self._pause(body))
        return await self.state()

    async def _pause(self, body: PauseBody) -> None:
        async with self._operation("pause"):
            state = self._shared.read()
            require(state, "serving", "paused", doing="pause")
            if state.pause is not None and state.pause.mode != body.mode:
                raise ConflictError(
                    f"cannot pause with mode {body.mode}: already paused with mode "
                    f"{state.pause.mode}",
                    remedy="POST /admin/v1/resume first",
                )
            if state.state == "serving":
                await pause_within(self._control, self._shared, body.mode, body.timeout_s)
            asked = new_pause(body.mode, body.hold_s)
            pause = asked.beside(state.pause)
            self._shared.change(lambda now: moved(now, "paused", pause=pause))

    async def resume(self) -> StateView:
        """Schedule again; this ends every caller's pause."""
        await self._background.to_the_end(self._resume())
        return await self.state()

    async def _resume(self) -> None:
        async with self._operation("resume"):
            require(self._shared.read(), "serving", "paused", doing="resume")
            # Also of an engine that counts as serving: should it stand still, this is the way out.
            await self._control.resume()
            self._shared.change(
                lambda now: moved(now, "serving", pause=None) if now.state == "paused" else now
            )

    async def sleep(self, body: SleepBody) -> SleepAnswer:
        """Release memory, measure what is left, and say whether it may be.

        Raises:
            ResidualMemoryError: the engine sleeps, and more is resident than may be.
            EnginePluginError: see `Sleeping.sleep`.
        """
        report = await self._background.to_the_end(self._sleep(body))
        memory = memory_answer(report, self._sleeping.leaks())
        if report.refused:
            raise residual_memory(report, memory)
        state = await self.state()
        return SleepAnswer(**state.model_dump(), memory=memory)

    async def _sleep(self, body: SleepBody) -> ResidualReport:
        async with self._operation("sleep"):
            return await self._sleeping.sleep(body)

    async def wake(self, body: WakeBody) -> StateView:
        """Map memory again; see `Sleeping.wake`."""
        await self._background.to_the_end(self._wake(body))
        return await self.state()

    async def _wake(self, body: WakeBody) -> None:
        async with self._operation("wake"):
            await self._sleeping.wake(body)

    async def memory(self) -> dict[str, object]:
        """What is resident of every rank, now."""
        return memory_answer(await self._sleeping.memory(), self._sleeping.leaks())

    async def prefill_gate(self) -> GateView:
        """The gate as the engine's scheduler says it is, between two steps."""
        return await self._call_gate("gate_report")

    async def configure_prefill_gate(self, body: GateBody) -> GateView:
        """Change settings of the gate, whatever state the engine is in.

        Raises:
            RefusedSettingError: a value that makes no sense on this machine.
        """
        try:
            return await self._call_gate(
                "gate_configure", changes=body.model_dump(exclude_unset=True)
            )
        except SettingsError as error:
            raise RefusedSettingError(
                error.message, remedy=error.remedy or "GET /admin/v1/prefill-gate says what holds"
            ) from error

    async def reset_prefill_gate(self) -> GateView:
        """Forget what was measured, and count from 0."""
        return await self._call_gate("gate_reset")

    async def _call_gate(self, call: str, **arguments: Any) -> GateView:
        answer = await self._control.call_gate(call, encode_call(**arguments))
        return GateView(**msgspec.to_builtins(read_answer(answer, GateReport)))

    async def flush(self, body: FlushBody) -> list[str]:
        """Empty caches, whatever the engine is doing short of an update."""
        return await self._background.to_the_end(self._flush(body))

    async def _flush(self, body: FlushBody) -> list[str]:
        async with self._operation("flush"):
            require(self._shared.read(), "serving", "paused", doing="flush")
            return await self._control.flush(
                prefix_cache=body.prefix_cache, multimodal_cache=body.multimodal_cache
            )

    async def add_source(self, body: bytes, content_type: str) -> str:
        """Hold a trainer process's manifest; the same manifest has the same id."""
        async with self._reading:
            return await asyncio.to_thread(self._sources.add, body, content_type)

    async def connect(self, body: ConnectBody, *, reached_at: str | None = None) -> PlanSummary:
        """Plan an update from sources, on every rank, and meet the peers.

        Args:
            body: the call.
            reached_at: this server's address, as the caller sees it.
        """
        return await self._background.to_the_end(self._connect(body, reached_at))

    async def _connect(self, body: ConnectBody, reached_at: str | None) -> PlanSummary:
        async with self._place_for_connect():
            state = self._shared.read()
            require(state, "serving", "paused", "fenced", "asleep", doing="connect")
            require_weights_mapped(state, doing="connect")
            # An engine that lacks our methods says so here, not in the update that needs them.
            await self._control.request_counts()
            facts = self._control.info.model_facts
            manifests = await asyncio.to_thread(self._sources.paths, body.source_ids, facts)
            compare_facts(body.model, facts, who="the connect call")
            plan_id = "plan-" + secrets.token_hex(8)
            try:
                answers = await self._workers.connect(
                    plan_id, manifests, direction=body.direction, reached_at=reached_at
                )
                _refuse_unused(answers)
            except EnginePluginError:
                with suppress(EnginePluginError):
                    await WorkerCalls(self._control.closing()).drop(plan_id)
                raise
            plan = _summary(plan_id, body.direction, answers)
            dropped = self._plans.add(plan)
            for old in dropped:
                await self._workers.drop(old)
            await asyncio.to_thread(self._sources.planned, plan_id, body.source_ids, dropped)
        return plan

    async def manifest(self, *, reached_at: str | None = None) -> EngineOffer:
        """The version that serves as a source for other engines.

        Args:
            reached_at: this server's address, as the caller sees it.

        Raises:
            ConflictError: no update of ours has been installed, or an engine's parameters do not
                hold what its loader copies; the text names them.
        """
        return await self._background.to_the_end(self._manifest(reached_at))

    async def _manifest(self, reached_at: str | None) -> EngineOffer:
        async with self._operation("offer the weights"):
            state = self._shared.read()
            require(state, "serving", "paused", doing="offer the weights")
            version = state.weights.version
            if version is None:
                raise ConflictError(
                    "this engine holds the weights that it was started with: where they lie is "
                    "known once an update has installed others",
                    remedy="update this engine first",
                )
            word = _word_of(state.weights)
            facts = self._control.info.model_facts
            manifests = await self._workers.manifests(facts, word, reached_at=reached_at)
        return EngineOffer(
            version=version,
            request_id=state.weights.request_id,
            manifests=manifests,
            source_word=word,
        )

    async def update(self, body: UpdateBody) -> UpdateReport:
        """Install new weights; see `Updates.update`."""
        return await self._updates.update(body)

    async def prepare(self, body: UpdateBody) -> UpdateReport:
        """Have new weights here, and go on serving the old ones; see `Updates.prepare`."""
        return await self._updates.prepare(body)

    async def commit(self, body: CommitBody) -> UpdateReport:
        """Install what was prepared; see `Updates.commit`."""
        return await self._updates.commit(body.request_id)

    async def abort(self, body: AbortBody) -> UpdateReport:
        """Give up what was prepared; see `Updates.abort`."""
        return await self._updates.abort(body)

    def weights(self) -> WeightsView:
        """The version that serves, past reports and known plans."""
        return WeightsView(
            version=self._shared.read().weights.version,
            history=self._updates.reports(),
            plans=[msgspec.to_builtins(plan) for plan in self._plans.listed()],
        )

    async def _request_counts(self) -> RequestCounts:
        """Ask the engine, but do not wait for a busy one, nor ask it twice at a time."""
        task = self._counting
        if task is None or task.done():
            task = self._counting = self._background.keep(self._control.request_counts())
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
            task = self._describing = self._background.keep(self._workers.describe())
        await asyncio.wait({task}, timeout=BUSY_WAIT_S)
        if not task.done() or task.exception() is not None:
            return []
        return [
            WorkerView(tp_rank=each.tp_rank, pid=each.pid, host=each.host) for each in task.result()
        ]

    @asynccontextmanager
    async def _operation(self, name: str) -> AsyncIterator[None]:
        """Hold the operation lock, over an engine that no dead process has left updating.

        Another call is waited for, but an update may take long, and is not.
        """

        def hopeless(state: EngineState) -> None:
            update = state.update
            if update is not None and update.phase != "prepared":
                raise self._shared.occupied(name)

        async with self._shared.operation(name, wait_s=WAIT_S, unless=hopeless):
            await self._updates.left.recover()
            await end_left_pause(self._control, self._shared)
            yield

    @asynccontextmanager
    async def _place_for_connect(self) -> AsyncIterator[None]:
        async with self._updates.place("connect", MOST_WAIT_S):
            await self._updates.left.recover()
            await end_left_pause(self._control, self._shared)
            yield


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
        connect_s=max(answer.connect_s for answer in answers),
        plan_s=max(answer.plan_s for answer in answers),
        ranks=ranks,
        destinations=[each.destination for each in answers if each.destination is not None],
    )


def _word_of(weights: WeightsInstalled) -> int:
    """The version word of installed weights: the same for whoever asks, another for others."""
    said = f"{weights.version} {weights.request_id} {weights.installed_at}"
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:6], "little") + 1


def _refuse_unused(answers: list[ConnectAnswer]) -> None:
    unused = set.intersection(*(set(answer.unused) for answer in answers))
    if unused:
        shown = ", ".join(sorted(unused)[:8])
        raise WeightMismatchError(
            f"{len(unused)} tensors reach no parameter of the engine's model: {shown}",
            remedy="publish the tensors of the model that this engine serves, and no others",
        )
