"""Sleep and wake: pause, release, measure, and say what is still resident; map again, and resume.

The caller of each method holds the operation lock, so no update is under way. From the moment that
the first rank may have released something the engine counts as asleep.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from typing import cast

import msgspec

from engine_plugins.admin.engine_control import EngineControl
from engine_plugins.admin.pausing import pause_within
from engine_plugins.admin.schemas import SleepBody, WakeBody
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.sleep_target import (
    asleep,
    awake_without_weights,
    judged,
    left_to_map,
    left_to_release,
    mapped,
    require_room,
    require_same_level,
    unknown_memory,
    without_weights,
)
from engine_plugins.admin.state import (
    EngineState,
    Fence,
    WeightsInstalled,
    moved,
    require,
)
from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.errors import EnginePluginError, ResidualMemoryError
from engine_plugins.settings import Settings
from engine_plugins.sleep.leak_watch import LeakTrend, LeakWatch
from engine_plugins.sleep.memory_backend import MemoryTag
from engine_plugins.sleep.memory_report import RankMemoryRow, ResidualPolicy, ResidualReport
from engine_plugins.sleep.metrics import ResidualMetrics
from engine_plugins.sleep.rank_sleep import LedgerView, Room
from engine_plugins.sleep.residual_memory import assess

__all__ = ["Sleeping", "memory_answer", "residual_memory"]

logger = logging.getLogger(__name__)

GIB = 1 << 30


class Sleeping:
    """The sleep of an engine, as one of its API processes drives it."""

    def __init__(self, control: EngineControl, shared: SharedState, settings: Settings) -> None:
        self._control = control
        self._settings = settings
        self._workers = WorkerCalls(control)
        self._shared = shared
        self._told: tuple[str, str] | None = None
        """What the log was told of memory last: a poll every second says nothing new."""

    async def sleep(self, body: SleepBody) -> ResidualReport:
        """Stop serving and release memory; more of it, where the engine sleeps already.

        Where all of it is released already, what is resident is measured again, and that is all.

        Raises:
            ConflictError: the state does not allow it, or the weights are not as `level` wants.
            UnsupportedError: a tag that the engine cannot release.
            SleepRefusedError: a rank could not, and the engine is as it was before.
            EnginePluginError: a rank failed half way, and the engine is fenced.
        """
        state = self._shared.read()
        require(state, "serving", "paused", "asleep", doing="sleep")
        require_same_level(state, body)
        left = left_to_release(
            await self._workers.ask("may_release", list[MemoryTag], tags=body.tags)
        )
        if state.sleep is not None and not left:
            return self._measured(await self._workers.ask("memory", RankMemoryRow))
        if state.state == "serving":
            await pause_within(self._control, self._shared, body.pause, body.timeout_s)
        self._shared.change(lambda now: asleep(now, body.level, left))
        try:
            rows = await self._release(left, keep=body.level == 1)
        except Exception as met:
            error = _ours(met)
            await self._undo(state, left, error, lost=body.level == 2 and "weights" in left)
            raise error from met
        report = self._measured(rows)
        watch = self._leaks().after(report)
        self._shared.revise("leaks", lambda _: msgspec.json.encode(watch))
        residual_metrics().record(report, watch.trends())
        return report

    async def _release(self, tags: Sequence[MemoryTag], *, keep: bool) -> list[RankMemoryRow]:
        if "kv_cache" in tags:
            await self._control.flush(prefix_cache=True, multimodal_cache=False)
        return await self._workers.ask("release", RankMemoryRow, tags=tags, keep=keep)

    def _measured(self, rows: list[RankMemoryRow]) -> ResidualReport:
        """The report on a sleeping engine; the state has its verdict."""
        report = self._assess(rows)
        self._shared.change(lambda now: judged(now, report))
        self._tell(report)
        return report

    async def memory(self) -> ResidualReport:
        """What every rank holds now; of an engine that is awake, its mapped memory is kept."""
        report = self._assess(await self._workers.ask("memory", RankMemoryRow))
        if (report.verdict, report.reason) != self._told:
            self._tell(report)
        return report

    def _tell(self, report: ResidualReport) -> None:
        self._told = (report.verdict, report.reason)
        if report.verdict != "pass":
            logger.warning(
                "residual memory: %s (%s) on %s under policy %s: %s",
                *(report.verdict, report.reason, report.worst_device),
                *(report.policy, report.detail),
            )

    def leaks(self) -> list[LeakTrend]:
        """Whether what stays resident grows from sleep to sleep, by device."""
        return self._leaks().trends()

    def _leaks(self) -> LeakWatch:
        kept = self._shared.kept("leaks")
        return msgspec.json.decode(kept, type=LeakWatch) if kept else LeakWatch()

    def _assess(self, rows: list[RankMemoryRow]) -> ResidualReport:
        return assess(
            rows,
            policy=cast(ResidualPolicy, self._settings.residual_policy),
            threshold_bytes=int(self._settings.max_residual_gpu_mem_gib * GIB),
            over_baseline_bytes=int(self._settings.residual_over_baseline_gib * GIB),
            measured_at=time.time(),
        )

    async def wake(self, body: WakeBody) -> None:
        """Map memory again; serve once all is mapped and the weights hold something.

        What is mapped already is passed over, so a wake that failed, or whose answer was lost, is
        completed by the same call.

        Raises:
            ConflictError: the engine is fenced or updating, or there is no room.
            SleepRefusedError: a rank had no room after all; the engine sleeps on.
            EnginePluginError: a rank failed half way, and the engine is fenced for good.
        """
        tags = left_to_map(self._shared.read(), body)
        if tags is None:
            return
        if tags:
            require_room(await self._workers.ask("room", Room, tags=tags))
            await self._restore(tags)
        sleep = self._shared.change(lambda now: mapped(now, tags)).sleep
        if sleep is not None and not sleep.released and not sleep.weights_lost:
            await self._rise(resume=sleep.resume)

    async def _restore(self, tags: Sequence[MemoryTag]) -> None:
        try:
            await self._workers.ask("restore", LedgerView, tags=tags)
        except Exception as met:
            error = _ours(met)
            await self._sleep_on(error)
            raise error from met

    async def _sleep_on(self, error: EnginePluginError) -> None:
        """After a wake that failed: asleep as before, where every rank knows what it has mapped.

        What some ranks have mapped counts as released until all have; a restore passes over it.
        """
        try:
            views = await self._workers.ask("ledger", LedgerView)
        except EnginePluginError as another:
            logger.error("asking what a wake has mapped met another error: %s", another)
            await self._fence(unknown_memory("wake_failed", error), error)
            return
        if any(view.broken for view in views):
            await self._fence(unknown_memory("wake_failed", error), error)
            return
        error.remedy = error.remedy or "the engine sleeps on; mend the cause and wake again"

    async def _rise(self, *, resume: bool) -> None:
        """Serve again, or be paused, as before the sleep."""
        if resume:
            await self._control.resume()
        self._shared.change(lambda now: moved(now, "serving" if resume else "paused", sleep=None))

    async def _undo(
        self,
        before: EngineState,
        tags: Sequence[MemoryTag],
        error: EnginePluginError,
        *,
        lost: bool,
    ) -> None:
        """Map again what ranks have released; the engine is as before, or fenced."""
        try:
            views = await self._workers.ask("ledger", LedgerView)
            gone = {tag for view in views for tag in view.released} & set(tags)
            await self._workers.ask("restore", LedgerView, tags=[*gone])
        except EnginePluginError as another:
            logger.error("undoing a sleep met another error: %s", another)
            await self._fence(unknown_memory("sleep_failed", error), error)
            return
        if any(view.broken for view in views):
            await self._fence(unknown_memory("sleep_failed", error), error)
            return
        if lost and "weights" in gone:
            self._shared.change(lambda now: awake_without_weights(now, before.sleep))
            await self._fence(without_weights(error), error)
            return
        if before.state == "serving":
            try:
                await self._control.resume()
            except EnginePluginError as another:
                # All is mapped, and a wake has nothing left to do but this.
                logger.error("undoing a sleep met another error: %s", another)
                self._shared.change(lambda now: mapped(now, tags, weights=before.weights))
                error.remedy = "POST /admin/v1/wake, to have the engine serve again"
                return
        self._shared.change(
            lambda now: moved(now, before.state, sleep=before.sleep, weights=before.weights)
        )
        error.remedy = error.remedy or "the engine is as before; mend the cause and sleep again"

    async def _fence(self, fence: Fence, error: EnginePluginError) -> None:
        """Serve nothing: no version names what is in memory, and held requests end."""
        self._shared.change(
            lambda now: moved(now, "fenced", fence=fence, weights=WeightsInstalled())
        )
        error.remedy = f"the engine is fenced; {fence.remedy}"
        try:
            ended = await self._control.fail_requests()
        except EnginePluginError as another:
            logger.error("engine fenced; its requests could not be ended: %s", another)
        else:
            logger.error("engine fenced: %s; %d requests ended", error.message, ended)


def _ours(error: Exception) -> EnginePluginError:
    """The error as the contract gives it: nothing may leave a sleep half undone."""
    if isinstance(error, EnginePluginError):
        return error
    return EnginePluginError(f"{type(error).__name__}: {error}")


residual_metrics = functools.cache(ResidualMetrics)
"""The series of this process, made when there is something to say."""


def memory_answer(report: ResidualReport, leaks: Sequence[LeakTrend]) -> dict[str, object]:
    """What is resident, and whether it grows, as the routes give it."""
    return {**msgspec.to_builtins(report), "leaks": msgspec.to_builtins(leaks)}


def residual_memory(report: ResidualReport, memory: object) -> ResidualMemoryError:
    """The error that a refused verdict becomes."""
    return ResidualMemoryError(
        f"the engine sleeps, and its memory is not free: {report.detail}",
        remedy="POST /admin/v1/wake, or restart the engine; see `memory` for who holds what",
        memory=memory,
    )
