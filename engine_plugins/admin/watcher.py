"""One task in every API process that ends what nobody else ends.

Whoever began something may have died or stand still since: a pause with a time, an update, the
hold of a drain. And an engine of which a process is dead must not leave a server behind that
answers nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from engine_plugins.admin import call_limits
from engine_plugins.admin.bounded_control import BoundedControl
from engine_plugins.admin.engine_processes import kernel_state, stands_still
from engine_plugins.admin.left_updates import LeftUpdates
from engine_plugins.admin.pausing import end_left_pause, end_overdue
from engine_plugins.admin.server_end import ServerEnd
from engine_plugins.admin.shared_state import SharedState, UnderWay
from engine_plugins.admin.state import (
    EngineState,
    Fence,
    given_up_for_dead,
    moved,
    overdue,
    refusal,
)
from engine_plugins.admin.update_record import UpdateRecord
from engine_plugins.errors import ConflictError, EngineStuckError, WriterStoppedError

__all__ = ["Watcher"]

logger = logging.getLogger(__name__)

LOOK_S = 1.0
SOURCES_S = 2.0
"""How often the trainers of a prepared update are looked at."""
STOPPED_S = 2.0
"""After an update's deadline: a process that is stopped does not carry it on."""
PATIENCE_S = 9.0
"""After it, of one that runs: it has limits of its own for each call to the engine."""


class Watcher:
    """What is looked at about once a second.

    Args:
        control: the engine.
        shared: the state that every process sees.
        updates: those of the engine that nobody carries on.
    """

    def __init__(self, control: BoundedControl, shared: SharedState, updates: LeftUpdates) -> None:
        self._control = control
        self._shared = shared
        self._updates = updates
        self._sources_at = 0.0
        self._said = ""
        self._moved_at = time.monotonic()
        self._call: UnderWay | None = None
        self._call_moved_at = 0.0

    async def run(self) -> None:
        """Look once a second, until this is cancelled: the server ends, or its engine is dead."""
        health = self._control.health
        health.on_death = ServerEnd(self._shared.runtime_dir).soon
        try:
            await self._look_for_ever()
        finally:
            health.death()

    async def _look_for_ever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except ConflictError:
                continue  # another call was quicker
            except WriterStoppedError:
                self._shared.take_over(lambda state: state)
            except Exception as error:
                self._say(error)
            else:
                self._said = ""

    async def look(self) -> None:
        """Look once, and do what is to be done."""
        if self._control.health.death() is not None:
            return  # the server ends
        generation, state = self._shared.generation, self._shared.read()
        call = self._shared.under_way()
        why = refusal(state)
        if why is not None:
            await self._control.end_waiting(why)
        stopped = self._stopped()
        if state.state == "updating":
            await self._look_at_update(call)
        elif call is not None:
            self._look_at_call(call, state, generation)
        elif state.state in ("serving", "paused") and stopped:
            async with self._shared.operation("fence an engine that stands still"):
                self._shared.change(lambda now: _standing_still(now, stopped))
        elif _stands_still(state) and not self._control.health.is_behind:
            async with self._shared.operation("lift a fence"):
                self._shared.change(_going_on)
        elif overdue(state, time.monotonic()):
            async with self._shared.operation("end a pause whose time is over"):
                await end_overdue(self._control, self._shared)
        elif state.holding is not None and not state.holding.lives:
            async with self._shared.operation("end the pause of a process that has died"):
                await end_left_pause(self._control, self._shared)

    def _stopped(self) -> str:
        """Which of the engine's processes have been stopped for long, as part of a sentence."""
        still = self._control.health.processes.still()
        if not still:
            self._moved_at = time.monotonic()
        return still if time.monotonic() - self._moved_at >= call_limits.STOPPED_S else ""

    def _look_at_call(self, call: UnderWay, state: EngineState, generation: int) -> None:
        """Count a process that stands still in its call as dead: others go on from there."""
        now = time.monotonic()
        if call != self._call or not stands_still(kernel_state(call.pid)):
            self._call, self._call_moved_at = call, now
        elif now - self._call_moved_at >= call_limits.STOPPED_S:
            logger.error("process %d is stopped in %s: others go on", call.pid, call.name)
            self._shared.take_over(lambda _: given_up_for_dead(state), of=generation)

    def _say(self, error: Exception) -> None:
        """Once for as long as it stays the same."""
        told = f"{type(error).__name__}: {error}"
        if told != self._said:
            logger.error("watching the engine: %s", told, exc_info=error)
        self._said = told

    async def _look_at_update(self, call: UnderWay | None) -> None:
        record = self._updates.under_way()
        if call is not None:
            if record is not None and record.prepared is None:
                await self._look_at_carrier(call, record)
            return
        waits = record is not None and record.prepared is not None
        if waits and record is not None and time.monotonic() < record.overdue_at:
            if time.monotonic() - self._sources_at >= SOURCES_S:
                self._sources_at = time.monotonic()
                async with self._shared.operation("look at a prepared update's trainers"):
                    await self._updates.look_at_sources()
            return
        async with self._shared.operation("give an update up"):
            await self._updates.recover()

    async def _look_at_carrier(self, call: UnderWay, record: UpdateRecord) -> None:
        """Take the place of a process that carries an update on no more."""
        over_s = time.monotonic() - record.deadline
        stopped = stands_still(kernel_state(call.pid))
        if over_s < (STOPPED_S if stopped else PATIENCE_S):
            return
        how = "is stopped" if stopped else f"has not ended it {over_s:.0f} s after its deadline"
        error = EngineStuckError(
            f"the API process that carried the update (pid {call.pid}) {how}",
            remedy="let that process go on, or kill it",
        )
        logger.error("%s: another takes its place", error.message)
        with suppress(ConflictError):
            await self._updates.take_over(record, error)


_CODE = "process_stopped"


def _standing_still(state: EngineState, stopped: str) -> EngineState:
    """Nothing was lost, but nobody is answered: the fence lifts itself."""
    if state.state not in ("serving", "paused"):
        return state
    fence = Fence(
        code=_CODE,
        detail=f"the engine stands still: {stopped}",
        remedy="let that process go on; the engine then serves as before",
        attempted_version=0,
    )
    return moved(state, "fenced", fence=fence)


def _stands_still(state: EngineState) -> bool:
    return state.state == "fenced" and state.fence is not None and state.fence.code == _CODE


def _going_on(state: EngineState) -> EngineState:
    """As before: only an engine that served or was paused is fenced like this."""
    if not _stands_still(state):
        return state
    return moved(state, "serving" if state.pause is None else "paused", fence=None)
