"""Updates that nobody carries on: given up by whichever process finds them."""

from __future__ import annotations

import logging
import time

from engine_plugins.admin.bounded_control import BoundedControl
from engine_plugins.admin.giving_up import GivingUp
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import WeightsInstalled, moved
from engine_plugins.admin.update_answers import UpdateAnswers
from engine_plugins.admin.update_outcome import failure_report, half_way
from engine_plugins.admin.update_record import UpdateRecord, UpdateRecords
from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.errors import (
    EnginePluginError,
    PeerLostError,
    SourceRevokedError,
    UpdateAbortedError,
    UpdateFailedError,
)
from engine_plugins.weights.contract.report import UpdateReport

__all__ = ["LeftUpdates"]

logger = logging.getLogger(__name__)

LOOK_S = 2.0
"""How long an engine may take to look at trainers; a commit would wait for it."""


class LeftUpdates:
    """An update whose process died, whose commit never came, or whose trainer is gone.

    Args:
        control: the engine.
        shared: the state that every process sees.
        answers: where the update's failure is kept for its caller.
    """

    def __init__(
        self, control: BoundedControl, shared: SharedState, answers: UpdateAnswers
    ) -> None:
        self._control = control
        self._shared = shared
        self._answers = answers
        self._records = UpdateRecords(shared)

    def under_way(self) -> UpdateRecord | None:
        """What is known of the update under way, whoever carries it."""
        return self._records.read() if self._shared.read().state == "updating" else None

    async def recover(self) -> None:
        """Give up an update that nobody carries on; the caller holds the operation lock.

        Either its commit is overdue, or the process that carried it has died: it would hold the
        lock otherwise.
        """
        record = self._records.read()
        if self._shared.read().state != "updating":
            if record is not None:
                await self._forget(record)
        elif record is None:
            await self._fence_without_record()
        elif record.prepared is None:
            # Whether it had come to its pause is not known.
            record.paused_here = record.before.state == "serving"
            error: EnginePluginError
            error = UpdateFailedError("the API process that carried the update ended")
            await self.give_up(record, error, writes_ended=True)
        elif time.monotonic() >= record.overdue_at:
            error = UpdateAbortedError(
                f"no commit came within {record.body.timeout_s:g} s of prepare"
            )
            await self.give_up(record, error, writes_ended=False)

    async def look_at_sources(self) -> None:
        """Give up a prepared update whose trainer is gone; the caller holds the operation lock."""
        record = self._records.read()
        if record is None or record.prepared is None or self._control.health.is_behind:
            return
        ends_at = time.monotonic() + LOOK_S
        try:
            await WorkerCalls(self._control.until(lambda: ends_at)).look()
        except (PeerLostError, SourceRevokedError) as error:
            error.message = f"while the update was prepared: {error.message}"
            # Its writes may have been cut off with it, or only its word to us.
            await self.give_up(record, error, writes_ended=False)

    async def take_over(self, record: UpdateRecord, error: EnginePluginError) -> None:
        """Carry on for a process that does not: fenced at once, then given up.

        Args:
            record: of the update.
            error: names the process.
        """
        fence = half_way(record.body.version, error)
        weights = WeightsInstalled() if record.touched else record.before.weights
        self._shared.take_over(
            lambda state: moved(state, "fenced", fence=fence, update=None, weights=weights),
            of=self._shared.generation,
        )
        async with self._shared.operation("give an update up"):
            if self._records.read() is not None:
                record.paused_here = record.before.state == "serving"
                await self.give_up(record, error, writes_ended=True)

    async def give_up(
        self, record: UpdateRecord, error: EnginePluginError, *, writes_ended: bool
    ) -> UpdateReport:
        """Give an update up, and keep its failure; the caller holds the operation lock.

        Args:
            record: of the update.
            error: why.
            writes_ended: whether a push's trainer is known to write no more.
        """
        giving_up = GivingUp(self._control, self._shared, record)
        error = await giving_up.give_up(error, writes_ended=writes_ended)
        report = failure_report(record, error)
        self._answers.keep(report, error)
        self._records.drop()
        return report

    async def _forget(self, record: UpdateRecord) -> None:
        """The update has ended, but nobody has said so to the workers, or that it has."""
        try:
            await WorkerCalls(self._control.closing()).abort()
        except EnginePluginError as error:
            logger.warning("the update to version %d: %s", record.body.version, error)
        self._records.drop()

    async def _fence_without_record(self) -> None:
        """An update of which nothing is known but that it was under way."""
        progress = self._shared.read().update
        version = 0 if progress is None else progress.version
        error = UpdateFailedError("its process ended, and what it wrote down of it is gone")
        fence = half_way(version, error)
        self._shared.change(
            lambda state: moved(
                state, "fenced", fence=fence, update=None, weights=WeightsInstalled()
            )
        )
        engine = self._control.closing()
        await WorkerCalls(engine).abort()
        await engine.fail_requests()
