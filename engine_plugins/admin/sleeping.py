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
from engine_plugins.admin.state import (
    EngineState,
    Fence,
    Sleep,
    WeightsInstalled,
    moved,
    not_now,
    require,
)
from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.errors import ConflictError, EnginePluginError, ResidualMemoryError
from engine_plugins.settings import Settings
from engine_plugins.sleep.leak_watch import LeakTrend, LeakWatch
from engine_plugins.sleep.memory_backend import MEMORY_TAGS, MemoryTag
from engine_plugins.sleep.memory_report import RankMemoryRow, ResidualPolicy, ResidualReport
from engine_plugins.sleep.metrics import ResidualMetrics
from engine_plugins.sleep.rank_sleep import LedgerView, Room
from engine_plugins.sleep.residual_memory import assess

__all__ = ["Sleeping", "memory_answer", "residual_memory"]

logger = logging.getLogger(__name__)

_FOLDER, _LEAKS = "sleep", "leaks"

GIB = 1 << 30


class Sleeping:
    """The sleep of an engine, as one of its API processes drives it."""

    def __init__(self, control: EngineControl, shared: SharedState, settings: Settings) -> None:
        self._control = control
        self._settings = settings
        self._workers = WorkerCalls(control)
        self._shared = shared

    async def sleep(self, body: SleepBody) -> ResidualReport:
        """Stop serving and release memory; more of it, where the engine sleeps already.

        Raises:
            ConflictError: the state does not allow it, or a tag is released already.
            UnsupportedError: a tag that the engine cannot release.
            SleepRefusedError: a rank could not, and the engine is as it was before.
            EnginePluginError: a rank failed half way, and the engine is fenced for good.
        """
        state = self._shared.read()
        require(state, "serving", "paused", "asleep", doing="sleep")
        if state.sleep is not None and body.tags is None:
            raise ConflictError(
                f"the engine sleeps already (released: {_named(state.sleep.released)})",
                remedy="POST /admin/v1/wake, or name the tags to release besides",
            )
        tags = (await self._workers.ask("may_release", list[MemoryTag], tags=body.tags))[0]
        if state.state == "serving":
            await pause_within(self._control, self._shared, body.pause, body.timeout_s)
        self._shared.change(lambda now: _asleep(now, body.level, tags))
        try:
            if "kv_cache" in tags:
                await self._control.flush(prefix_cache=True, multimodal_cache=False)
            keep = body.level == 1
            rows = await self._workers.ask("release", RankMemoryRow, tags=tags, keep=keep)
        except EnginePluginError as error:
            await self._undo(state, tags, error, lost=body.level == 2 and "weights" in tags)
            raise
        report = self._assess(rows)
        self._shared.change(lambda now: _judged(now, report))
        watch = self._leaks().after(report)
        self._shared.put(_FOLDER, _LEAKS, msgspec.json.encode(watch))
        residual_metrics().record(report, watch.trends())
        return report

    async def memory(self) -> ResidualReport:
        """What every rank holds now; of an engine that is awake, its mapped memory is kept."""
        return self._assess(await self._workers.ask("memory", RankMemoryRow))

    def leaks(self) -> list[LeakTrend]:
        """Whether what stays resident grows from sleep to sleep, by device."""
        return self._leaks().trends()

    def _leaks(self) -> LeakWatch:
        kept = self._shared.get(_FOLDER, _LEAKS)
        return LeakWatch() if kept is None else msgspec.json.decode(kept, type=LeakWatch)

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

        Raises:
            ConflictError: the engine does not sleep, a tag is not released, or there is no room.
            SleepRefusedError: a rank had no room after all; the engine sleeps on.
            EnginePluginError: a rank failed half way, and the engine is fenced for good.
        """
        state = self._shared.read()
        require(state, "asleep", doing="wake")
        asleep = state.sleep
        if asleep is None or not asleep.released:  # all is mapped: only an update ends this sleep
            raise not_now(state, doing="wake")
        tags = asleep.released if body.tags is None else body.tags
        wrong = [tag for tag in tags if tag not in asleep.released]
        if wrong:
            raise ConflictError(
                f"cannot wake {_named(wrong)}: released are {_named(asleep.released)}",
                remedy="name only those, or none",
            )
        _require_room(await self._workers.ask("room", Room, tags=tags))
        try:
            await self._workers.ask("restore", LedgerView, tags=tags)
        except EnginePluginError as error:
            await self._sleep_on(error)
            raise
        left = [tag for tag in asleep.released if tag not in tags]
        now = msgspec.structs.replace(asleep, released=left)
        self._shared.change(lambda then: msgspec.structs.replace(then, sleep=now))
        if not left and not asleep.weights_lost:
            await self._rise(resume=asleep.resume)

    async def _sleep_on(self, error: EnginePluginError) -> None:
        """After a wake that failed: asleep as before, where every rank knows what it has mapped.

        What some ranks have mapped counts as released until all have; a restore passes over it.
        """
        try:
            views = await self._workers.ask("ledger", LedgerView)
        except EnginePluginError as another:
            logger.error("asking what a wake has mapped met another error: %s", another)
            self._fence("wake_failed", error)
            return
        if any(view.broken for view in views):
            self._fence("wake_failed", error)
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
        """Map again what ranks have released; the engine is as before, or fenced for good."""
        try:
            views = await self._workers.ask("ledger", LedgerView)
            gone = {tag for view in views for tag in view.released} & set(tags)
            await self._workers.ask("restore", LedgerView, tags=[*gone])
        except EnginePluginError as another:
            logger.error("undoing a sleep met another error: %s", another)
            self._fence("sleep_failed", error)
            return
        if (lost and "weights" in gone) or any(view.broken for view in views):
            self._fence("sleep_failed", error)
            return
        if before.state == "serving":
            await self._control.resume()
        self._shared.change(
            lambda now: moved(now, before.state, sleep=before.sleep, weights=before.weights)
        )
        error.remedy = error.remedy or "the engine is as before; mend the cause and sleep again"

    def _fence(self, code: str, error: EnginePluginError) -> None:
        fence = Fence(
            code=code,
            detail=f"a rank's memory is in an unknown state: {error.message}",
            remedy="restart the engine",
            attempted_version=0,
            for_good=True,
        )
        self._shared.change(lambda now: moved(now, "fenced", fence=fence))
        error.remedy = f"the engine is fenced; {fence.remedy}"


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


def _require_room(rooms: Sequence[Room]) -> None:
    """Refuse a wake that would end half mapped.

    Raises:
        ConflictError: a device has less free than its ranks are about to map.
    """
    for device in {room.device for room in rooms}:
        ranks = [room for room in rooms if room.device == device]
        needed, free = sum(each.needed_bytes for each in ranks), min(r.free_bytes for r in ranks)
        if needed > free:
            raise ConflictError(
                f"cannot wake: {needed / GIB:.3g} GiB are to be mapped on {device}, where "
                f"{free / GIB:.3g} GiB are free",
                remedy="have whoever holds that memory give it back, then wake; or wake by tags",
            )


def _asleep(state: EngineState, level: int, tags: Sequence[MemoryTag]) -> EngineState:
    """The state from the moment on at which tags may be out of memory."""
    before = state.sleep
    lost = level == 2 and "weights" in tags
    released = {*tags, *(before.released if before is not None else ())}
    sleep = Sleep(
        level=max(level, before.level if before is not None else level),
        released=[tag for tag in MEMORY_TAGS if tag in released],
        since=time.time(),
        resume=state.state == "serving" if before is None else before.resume,
        weights_lost=lost or (before is not None and before.weights_lost),
    )
    weights = WeightsInstalled() if lost else state.weights
    return moved(state, "asleep", sleep=sleep, weights=weights)


def _judged(state: EngineState, report: ResidualReport) -> EngineState:
    sleep = state.sleep
    if sleep is None:
        return state
    sleep = msgspec.structs.replace(sleep, verdict=report.verdict, reason=report.reason or None)
    return msgspec.structs.replace(state, sleep=sleep)


def _named(tags: Sequence[MemoryTag]) -> str:
    return ", ".join(tags) or "nothing"
