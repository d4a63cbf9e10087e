"""What the admin routes do, once a request is known to be allowed and well-formed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from engine_plugins.admin.background import Background
from engine_plugins.admin.bounded_control import bounded
from engine_plugins.admin.connecting import Connecting
from engine_plugins.admin.engine_control import EngineControl
from engine_plugins.admin.pausing import end_left_pause, new_pause, pause_within
from engine_plugins.admin.plans import Plans
from engine_plugins.admin.schemas import (
    AbortBody,
    CommitBody,
    ConnectBody,
    FlushBody,
    GateBody,
    GateView,
    PauseBody,
    SleepAnswer,
    SleepBody,
    StateView,
    UpdateBody,
    WakeBody,
    WeightsView,
)
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.sleeping import Sleeping, memory_answer, residual_memory
from engine_plugins.admin.sources import Sources
from engine_plugins.admin.state import (
    EngineState,
    moved,
    require,
    require_weights_mapped,
)
from engine_plugins.admin.updates import MOST_WAIT_S, Updates
from engine_plugins.admin.viewing import Viewing
from engine_plugins.admin.watcher import Watcher
from engine_plugins.admin_answers import EngineOffer
from engine_plugins.errors import (
    ConflictError,
    RefusedSettingError,
    SettingsError,
)
from engine_plugins.prefill_gate.gate_report import GateReport
from engine_plugins.settings import Settings
from engine_plugins.sleep.memory_report import ResidualReport
from engine_plugins.weights.contract.report import PlanSummary, UpdateReport
from engine_plugins.weights.receiving.worker_messages import encode_call, read_answer

__all__ = ["AdminService"]

logger = logging.getLogger(__name__)

WAIT_S = 5.0
"""How long a call waits for another to end."""


class AdminService:
    """The admin contract over one engine, in one of its API processes."""

    def __init__(self, control: EngineControl, shared: SharedState, settings: Settings) -> None:
        self._control = bounded(control, shared)
        self._shared = shared
        self._reading = asyncio.Lock()
        """One manifest at a time: each thread that computes makes the event loop wait its turn."""
        self._sources = Sources(shared.runtime_dir, max_entries=settings.max_manifest_entries)
        self._plans = Plans(shared)
        self._connecting = Connecting(self._control, self._sources, self._plans)
        self._background = Background()
        self._viewing = Viewing(self._control, shared, self._background)
        self._updates = Updates(self._control, shared, settings, self._background)
        self._sleeping = Sleeping(self._control, shared, settings)
        self.watcher = Watcher(self._control, shared, self._updates.left)
        """Runs for as long as the application does, see `late_admin`."""

    @property
    def state_name(self) -> str:
        """The state's name, for error answers."""
        return self._shared.read().state

    async def state(self) -> StateView:
        """Everything about the engine that can be said at once."""
        return await self._viewing.state()

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
            return await self._connecting.connect(body, reached_at)

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
            return await self._connecting.offer(state.weights, reached_at)

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
