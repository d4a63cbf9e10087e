"""Weight updates, in one call or in two phases, each once however often it is asked for.

The operation lock is held during a call, never between two. What lies between them is the record
in the runtime directory, so any API process may take the next call.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager

from engine_plugins.admin.background import Background
from engine_plugins.admin.bounded_control import bounded
from engine_plugins.admin.call_limits import UPDATE_GRACE_S
from engine_plugins.admin.engine_control import EngineControl
from engine_plugins.admin.left_updates import LeftUpdates
from engine_plugins.admin.plans import Plans
from engine_plugins.admin.schemas import AbortBody, UpdateBody
from engine_plugins.admin.shared_state import Held, SharedState
from engine_plugins.admin.staging_claims import StagingClaims
from engine_plugins.admin.state import (
    EngineState,
    moved,
    refuse_for_good,
    require,
    require_weights_mapped,
)
from engine_plugins.admin.update_acceptance import (
    mode_in_two_phases,
    refuse_partial,
    refuse_push,
    refuse_stale,
    refuse_verify,
)
from engine_plugins.admin.update_answers import UpdateAnswers, refuse_other_update
from engine_plugins.admin.update_outcome import stands_still
from engine_plugins.admin.update_record import UpdateRecord, UpdateRecords
from engine_plugins.admin.update_transaction import UpdateTransaction
from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.errors import (
    ConflictError,
    EnginePluginError,
    EngineStuckError,
    OutdatedError,
    UnknownIdError,
    UpdateAbortedError,
)
from engine_plugins.settings import Settings
from engine_plugins.weights.contract.report import PlanSummary, UpdateReport
from engine_plugins.weights.receiving.staging import (
    ModeChoice,
    StagingRoom,
    choose_mode,
    newly_taken,
)

__all__ = ["Updates"]

MOST_WAIT_S = 30.0
"""For another call to end. Its caller's own patience is `timeout_s`, where it says one."""


class Updates:
    """The updates of an engine, in one of its API processes."""

    def __init__(
        self,
        control: EngineControl,
        shared: SharedState,
        settings: Settings,
        background: Background,
    ) -> None:
        self._control = bounded(control, shared)
        self._claims = StagingClaims()
        self._shared = shared
        self._settings = settings
        self._background = background
        self._answers = UpdateAnswers(shared)
        self._records = UpdateRecords(shared)
        self.left = LeftUpdates(self._control, shared, self._answers)
        self._plans = Plans(shared)

    async def update(self, body: UpdateBody) -> UpdateReport:
        """Install new weights; a request_id that was answered before is answered again.

        Raises:
            StoredFailure: this request_id failed before.
            EnginePluginError: see UpdateTransaction.run.
        """
        refuse_verify(body)
        given = self._answers.again(body)
        if given is not None:
            return given
        return await self._background.to_the_end(self._update(body))

    async def prepare(self, body: UpdateBody) -> UpdateReport:
        """Have every byte here; the engine stays as it is until `commit`, or `abort`.

        Without either the update is given up `timeout_s` after this call began.

        Raises:
            StoredFailure: this request_id failed before, or was aborted.
            EnginePluginError: see UpdateTransaction.prepare.
        """
        refuse_verify(body)
        given = self._given(body)
        if given is not None:
            return given
        return await self._background.to_the_end(self._prepare(body))

    async def commit(self, request_id: str) -> UpdateReport:
        """Install what was prepared under a request_id; repeated, the same report again.

        Raises:
            StoredFailure: it failed before, or was aborted.
            UnknownIdError: nothing was prepared under it.
            EnginePluginError: see UpdateTransaction.commit.
        """
        given = self._answers.of(request_id)
        if given is not None:
            return given.report_or_raise()
        return await self._background.to_the_end(self._commit(request_id))

    async def abort(self, body: AbortBody) -> UpdateReport:
        """Give up what was prepared under a request_id; also fine if it had failed or was aborted.

        Raises:
            UnknownIdError: nothing was prepared under it.
            ConflictError: it was committed.
        """
        given = self._answers.of(body.request_id)
        if given is None:
            return await self._background.to_the_end(self._abort(body))
        if given.report.outcome == "installed":
            raise ConflictError(
                f"cannot abort {body.request_id!r}: its version {given.report.version} is "
                "installed",
                remedy="update again, with the weights of before and a newer version",
            )
        return given.report

    def place(self, name: str, patience_s: float) -> AbstractAsyncContextManager[Held]:
        """The one place for operations, once whoever has it has ended.

        Refused at once where a wait makes nothing possible.
        """

        def hopeless(state: EngineState) -> None:
            call = self._shared.under_way()
            refuse_for_good(state, doing=name)
            if call is not None and call.name not in ("wake", "sleep"):
                require_weights_mapped(state, doing=name)

        wait_s = min(patience_s, MOST_WAIT_S)
        return self._shared.operation(name, wait_s=wait_s, unless=hopeless)

    def reports(self) -> list[dict[str, object]]:
        """Reports of updates that have ended, newest first."""
        return self._answers.reports()

    async def _update(self, body: UpdateBody) -> UpdateReport:
        async with self.place("update", body.timeout_s) as held:
            # The same request may have been answered while this one came to the lock.
            given = self._answers.again(body)
            if given is not None:
                return given
            plan = await self._accepted(body, doing="update")
            refuse_push(plan)
            return await self._run(body, plan, held.waited_s)

    async def _run(self, body: UpdateBody, plan: PlanSummary, waited_s: float) -> UpdateReport:
        rooms = [] if body.mode == "in_place" else await self._rooms(body)
        with self._claims.claimed(newly_taken(rooms)) as others:
            mode = choose_mode(body.mode, rooms, self._settings.staging_bytes, others)
            transaction = self._begin(body, plan, mode, waited_s)
            report = await self._carried(transaction, transaction.run())
        self._ended(report)
        return report

    async def _rooms(self, body: UpdateBody) -> list[StagingRoom]:
        ends_at = time.monotonic() + body.timeout_s + UPDATE_GRACE_S
        try:
            workers = WorkerCalls(self._control.until(lambda: ends_at))
            return await workers.staging_room(body.plan_id)
        except EngineStuckError as error:
            fence = stands_still(body.version, error, error, touched=False)
            self._shared.change(lambda state: moved(state, "fenced", fence=fence))
            error.remedy = f"the engine is fenced; {fence.remedy}"
            raise

    async def _prepare(self, body: UpdateBody) -> UpdateReport:
        async with self.place("prepare", body.timeout_s) as held:
            given = self._given(body)
            if given is not None:
                return given
            plan = await self._accepted(body, doing="prepare an update")
            mode = mode_in_two_phases(body, plan)
            transaction = self._begin(body, plan, mode, held.waited_s)
            return await self._carried(transaction, transaction.prepare())

    async def _commit(self, request_id: str) -> UpdateReport:
        async with self.place("commit", MOST_WAIT_S) as held:
            record = await self._prepared(request_id)
            if isinstance(record, UpdateReport):
                return record
            record.seconds["wait_s"] = record.seconds.get("wait_s", 0.0) + held.waited_s
            transaction = UpdateTransaction(self._control, self._shared, record)
            report = await self._carried(transaction, transaction.commit())
            self._ended(report)
            return report

    async def _abort(self, body: AbortBody) -> UpdateReport:
        async with self.place("abort", MOST_WAIT_S):
            await self.left.recover()
            given = self._answers.of(body.request_id)
            if given is not None:
                return given.report
            record = self._records.prepared(body.request_id)
            if record is None:
                raise _nothing_prepared(body.request_id)
            error = UpdateAbortedError(
                f"its caller aborted the update to version {record.body.version}"
            )
            return await self.left.give_up(record, error, writes_ended=body.writes_ended)

    async def _prepared(self, request_id: str) -> UpdateRecord | UpdateReport:
        """The record of a prepared update, or the report if it was committed meanwhile."""
        await self.left.recover()
        given = self._answers.of(request_id)
        if given is not None:
            return given.report_or_raise()
        record = self._records.prepared(request_id)
        if record is None:
            raise _nothing_prepared(request_id)
        return record

    def _given(self, body: UpdateBody) -> UpdateReport | None:
        """The answer to a prepare that came before."""
        record = self._records.prepared(body.request_id)
        if record is None or record.prepared is None:
            return self._answers.again(body)
        refuse_other_update(record.prepared, body)
        return record.prepared

    async def _accepted(self, body: UpdateBody, *, doing: str) -> PlanSummary:
        """The plan of an update that may begin now."""
        await self.left.recover()
        plan = self._plans.get(body.plan_id)
        state = self._shared.read()
        require(state, "serving", "paused", "fenced", "asleep", doing=doing)
        require_weights_mapped(state, doing=doing)
        refuse_stale(state, body)
        refuse_partial(state, plan, holds_nothing=self._control.info.starts_empty)
        return plan

    def _begin(
        self, body: UpdateBody, plan: PlanSummary, mode: ModeChoice, waited_s: float
    ) -> UpdateTransaction:
        self._plans.use(plan.plan_id)
        return UpdateTransaction.begin(
            self._control, self._shared, body, plan, mode, waited_s=waited_s
        )

    async def _carried(
        self, transaction: UpdateTransaction, step: Awaitable[UpdateReport]
    ) -> UpdateReport:
        try:
            return await step
        except OutdatedError:
            raise
        except EnginePluginError as error:
            self._ended(transaction.failure_report(error), error)
            raise

    def _ended(self, report: UpdateReport, error: EnginePluginError | None = None) -> None:
        self._answers.keep(report, error)
        self._records.drop()


def _nothing_prepared(request_id: str) -> UnknownIdError:
    return UnknownIdError(
        f"nothing is prepared under request_id {request_id[:80]!r}",
        remedy="POST /admin/v1/weights/prepare first",
    )
