"""Giving an update up: back to the old weights if none was touched, otherwise behind a fence."""

from __future__ import annotations

import logging
from contextlib import suppress

from engine_plugins.admin.bounded_control import bounded
from engine_plugins.admin.engine_control import EngineControl
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import Pause, WeightsInstalled, moved
from engine_plugins.admin.update_outcome import half_way, lost_memory, stands_still
from engine_plugins.admin.update_record import UpdateRecord
from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.errors import EngineDeadError, EnginePluginError, EngineStuckError

__all__ = ["GivingUp"]

logger = logging.getLogger(__name__)


class GivingUp:
    """The end of one update that failed. The caller holds the operation lock.

    Args:
        control: the engine.
        shared: the state that every process sees.
        record: where the update stands.
    """

    def __init__(self, control: EngineControl, shared: SharedState, record: UpdateRecord) -> None:
        self._engine = bounded(control, shared)
        self._shared = shared
        self._record = record
        self._version = record.body.version

    async def give_up(
        self, error: EnginePluginError, *, writes_ended: bool = True
    ) -> EnginePluginError:
        """Back to the old weights if none was touched; otherwise behind a fence.

        Args:
            error: why; its remedy will say what serves.
            writes_ended: whether a push's trainer is known to write no more.

        Returns:
            The error to tell: the same, or that the engine does not answer.
        """
        wrote, lost, still = self._record.touched, False, self._record.paused_here
        pushed = self._record.plan.direction == "push"
        engine = self._engine.closing()
        try:
            workers = WorkerCalls(engine)
            answer = await workers.abort(writes_ended=writes_ended if pushed else None)
            wrote, lost = answer.wrote or wrote, answer.lost
            if wrote or lost:
                await self._fence(error, lost=lost)
                return error
            if still:
                await engine.resume()
                still = False
        except (EngineStuckError, EngineDeadError) as silent:
            return await self._fence_silent(error, silent)
        except Exception:
            logger.exception("giving up an update met another error")
            if wrote or lost:
                self._close_fence(error, lost=lost)
                return error
        self._back(error, still=still)
        return error

    def _back(self, error: EnginePluginError, *, still: bool) -> None:
        """The state of before the update; but an engine that was not resumed is told as paused."""
        before = self._record.before
        name = "paused" if still else before.state
        pause = Pause(mode=self._record.body.pause, until=None) if still else before.pause
        self._shared.change(
            lambda state: moved(state, name, pause=pause, fence=before.fence, update=None)
        )
        where = (
            "the old weights are there, and the engine stands still: POST /admin/v1/resume"
            if still
            else "the old weights serve on; mend the cause and update again"
        )
        error.remedy = error.remedy or where

    async def _fence(self, error: EnginePluginError, *, lost: bool) -> None:
        self._close_fence(error, lost=lost)
        ended = await self._engine.closing().fail_requests()
        logger.error("engine fenced: %s; %d requests ended with an error", error.message, ended)

    def _close_fence(self, error: EnginePluginError, *, lost: bool) -> None:
        fence = (lost_memory if lost else half_way)(self._version, error)
        self._shared.change(
            lambda state: moved(
                state, "fenced", fence=fence, update=None, weights=WeightsInstalled()
            )
        )
        error.remedy = f"the engine is fenced; {fence.remedy}"

    async def _fence_silent(
        self, error: EnginePluginError, silent: EngineStuckError | EngineDeadError
    ) -> EnginePluginError:
        """Refuse requests of an engine that does not answer.

        It is told to give up and to end its requests all the same: it does so once it goes on.
        """
        told = error
        if not isinstance(error, EngineStuckError | EngineDeadError):
            told, silent.message = silent, f"{error.message}; giving up, {silent.message}"
        touched = self._record.touched
        fence = stands_still(self._version, told, silent, touched=touched)
        changes = {"weights": WeightsInstalled()} if touched else {}
        self._shared.change(
            lambda state: moved(state, "fenced", fence=fence, update=None, **changes)
        )
        told.remedy = f"the engine is fenced; {fence.remedy}"
        logger.error("engine fenced: %s", told.message)
        with suppress(EnginePluginError):
            await self._engine.closing().fail_requests()
        return told
