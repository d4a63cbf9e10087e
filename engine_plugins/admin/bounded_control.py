"""An engine whose every call ends in time, whatever becomes of the engine.

The engine's own call is never cancelled: its late answer would be taken for another's. It is
awaited in the background, and nobody acts upon it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from engine_plugins.admin.call_limits import CLOSING_S, LOOK_S, STILL_S, STOPPED_S, limit_of
from engine_plugins.admin.engine_control import EngineControl, EngineInfo, PauseMode, RequestCounts
from engine_plugins.admin.engine_health import EngineHealth
from engine_plugins.admin.engine_processes import EngineProcesses
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.errors import EngineCallError, OutdatedError

__all__ = ["BoundedControl", "bounded"]

T = TypeVar("T")


class BoundedControl:
    """The `EngineControl` that the admin side uses, over an engine's own.

    Args:
        control: the engine's own.
        shared: tells whether another process has taken the place of whoever calls.
        health: shared by all that call this engine from this process.
        ends_at: when calls end, by the monotonic clock; None for each call's own limit.
    """

    def __init__(
        self,
        control: EngineControl,
        shared: SharedState,
        health: EngineHealth,
        ends_at: Callable[[], float] | None = None,
    ) -> None:
        self._control = control
        self.shared = shared
        self.health = health
        self._ends_at = ends_at

    def until(self, ends_at: Callable[[], float]) -> BoundedControl:
        """The same engine for the calls of an update, which end when that does."""
        return BoundedControl(self._control, self.shared, self.health, ends_at)

    def closing(self) -> BoundedControl:
        """The same engine for giving up: it is told, and not waited for where it owes answers."""
        ends_in = STILL_S if self.health.is_behind else CLOSING_S
        ends_at = time.monotonic() + ends_in
        return self.until(lambda: ends_at)

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        return self._control.info

    def death(self) -> str | None:
        """Why the engine's own client holds it for dead."""
        return self._control.death()

    async def pause(self, mode: PauseMode) -> None:
        """Stop scheduling. Outside of an update `pause_within` says for how long to try."""
        ends_at = math.inf if self._ends_at is None else self._ends_at()
        await self._until(ends_at, f"pause({mode})", self._control.pause(mode))

    async def resume(self) -> None:
        """Schedule again."""
        await self._ask("resume", self._control.resume())

    async def flush(self, *, prefix_cache: bool, multimodal_cache: bool) -> list[str]:
        """Empty caches and say which."""
        call = self._control.flush(prefix_cache=prefix_cache, multimodal_cache=multimodal_cache)
        return await self._ask("flush", call)

    async def isolate_kv(self) -> None:
        """Keep every request that has no KV away from old KV."""
        await self._ask("isolate_kv", self._control.isolate_kv())

    async def fail_requests(self) -> int:
        """End every held and queued request with an error."""
        return await self._ask("fail_requests", self._control.fail_requests())

    async def end_waiting(self, reason: str) -> int:
        """End the requests that this API process waits for, without the engine."""
        return await self._ask("end_waiting", self._control.end_waiting(reason))

    async def request_counts(self) -> RequestCounts:
        """How many requests there are."""
        return await self._ask("request_counts", self._control.request_counts())

    async def publish_version(self, version: int) -> None:
        """Have the engine label what it generates from now on."""
        await self._ask("publish_version", self._control.publish_version(version))

    async def call_workers(self, call: str, arguments: bytes) -> list[bytes]:
        """Have every worker answer a call."""
        return await self._ask(call, self._control.call_workers(call, arguments))

    async def call_gate(self, call: str, arguments: bytes) -> bytes:
        """Have the scheduler answer a call of its gate."""
        return await self._ask(call, self._control.call_gate(call, arguments))

    async def _ask(self, call: str, work: Coroutine[Any, Any, T]) -> T:
        if self._ends_at is not None:
            return await self._until(self._ends_at(), call, work)
        limit = limit_of(call)
        return await self._until(time.monotonic() + limit, call, work, stopped_s=STOPPED_S)

    async def _until(
        self,
        ends_at: float,
        call: str,
        work: Coroutine[Any, Any, T],
        *,
        stopped_s: float = math.inf,
    ) -> T:
        """Wait for a call of the engine's.

        Args:
            ends_at: when to give up; but what is asked late is given a moment to answer.
            call: what errors name.
            work: the engine's own call.
            stopped_s: how long to wait for a process that is seen to be stopped.

        Raises:
            OutdatedError: another process has taken the caller's place; nothing was asked.
            EngineDeadError: a process of the engine has ended.
            EngineStuckError: there was no answer in time.
        """
        try:
            self.shared.require_newest()
        except OutdatedError:
            work.close()
            raise
        asked = moved_at = time.monotonic()
        ends_at = max(ends_at, asked + STILL_S)
        task = asyncio.create_task(work)
        self.health.hold(task)
        while True:
            await asyncio.wait({task}, timeout=min(LOOK_S, max(ends_at - time.monotonic(), 0.0)))
            dead = self.health.death() if not task.done() or _has_failed(task) else None
            if task.done():
                if dead is not None:
                    raise dead from task.exception()
                return task.result()
            now = time.monotonic()
            if not self.health.processes.still():
                moved_at = now
            if dead is not None or now >= ends_at or now - moved_at >= stopped_s:
                stuck = self.health.give_up(call, task, after_s=now - asked)
                raise dead or stuck


def _has_failed(task: asyncio.Task[Any]) -> bool:
    return not task.cancelled() and isinstance(task.exception(), EngineCallError)


def bounded(control: EngineControl, shared: SharedState) -> BoundedControl:
    """An engine's control with its calls bounded, once however often it is asked for."""
    if isinstance(control, BoundedControl):
        return control
    processes = EngineProcesses(shared.runtime_dir)
    return BoundedControl(control, shared, EngineHealth(processes, control.death))
