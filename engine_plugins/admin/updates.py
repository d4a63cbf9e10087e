"""Weight updates, in one call or in two phases, each once however often it is asked for.

The operation lock is held during a call, never between two. What lies between them is the record
in the runtime directory, so any API process may take the next call.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager

from engine_plugins.admin.background import Background
from engine_plugins.admin.bounded_control import bounded
from engine_plugins.admin.call_limits import UPDATE_GRACE_S
from engine_plugins.admin.engine_control import EngineControl
from engine_plugins.admin.plans import Plans
from engine_plugins.admin.schemas import AbortBody, UpdateBody
from engine_plugins.admin.shared_state import Held, SharedState
from engine_plugins.admin.staging_claims import StagingClaims
from engine_plugins.admin.state import (
    EngineState,
    WeightsInstalled,
    moved,
    refuse_for_good,
    require,
    require_weights_mapped,
)
from engine_plugins.admin.update_answers import UpdateAnswers, refuse_other_update
from engine_plugins.admin.update_outcome import half_way, stands_still
from engine_plugins.admin.update_record import UpdateRecord, UpdateRecords
from engine_plugins.admin.update_transaction import UpdateTransaction
from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.errors import (
    ConflictError,
    EnginePluginError,
    EngineStuckError,
    OutdatedError,
    PeerLostError,
    SourceRevokedError,
    StaleVersionError,
    UnknownIdError,
    UnsupportedError,
    UpdateAbortedError,
    UpdateFailedError,
)
from engine_plugins.settings import Settings
from engine_plugins.weights.report import PlanSummary, UpdateReport
from engine_plugins.weights.staging import ModeChoice, StagingRoom, choose_mode, newly_taken

__all__ = ["Updates"]

LOOK_S = 2.0
"""How long an engine may take to look at trainers; a commit would wait for it."""

logger = logging.getLogger(__name__)

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
        self._plans = Plans(shared)

    async def update(self, body: UpdateBody) -> UpdateReport:
        """Install new weights; a request_id that was answered before is answered again.

        Raises:
            StoredFailure: this request_id failed before.
            EnginePluginError: see UpdateTransaction.run.
        """
        _refuse_verify(body)
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
        _refuse_verify(body)
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
            await self._give_up(record, error, writes_ended=True)
        elif time.monotonic() >= record.overdue_at:
            error = UpdateAbortedError(
                f"no commit came within {record.body.timeout_s:g} s of prepare"
            )
            await self._give_up(record, error, writes_ended=False)

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
            await self._give_up(record, error, writes_ended=False)

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
                await self._give_up(record, error, writes_ended=True)

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
            if plan.direction == "push":
                raise ConflictError(
                    f"{plan.plan_id} is a push: its trainer writes before anything is installed",
                    remedy="POST /admin/v1/weights/prepare, write, then /admin/v1/weights/commit",
                )
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
            mode = _mode_in_two_phases(body, plan)
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
            await self.recover()
            given = self._answers.of(body.request_id)
            if given is not None:
                return given.report
            record = self._records.prepared(body.request_id)
            if record is None:
                raise _nothing_prepared(body.request_id)
            error = UpdateAbortedError(
                f"its caller aborted the update to version {record.body.version}"
            )
            return await self._give_up(record, error, writes_ended=body.writes_ended)

    async def _prepared(self, request_id: str) -> UpdateRecord | UpdateReport:
        """The record of a prepared update, or the report if it was committed meanwhile."""
        await self.recover()
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
        await self.recover()
        plan = self._plans.get(body.plan_id)
        state = self._shared.read()
        require(state, "serving", "paused", "fenced", "asleep", doing=doing)
        require_weights_mapped(state, doing=doing)
        _refuse_stale(state, body)
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

    async def _give_up(
        self, record: UpdateRecord, error: EnginePluginError, *, writes_ended: bool
    ) -> UpdateReport:
        transaction = UpdateTransaction(self._control, self._shared, record)
        error = await transaction.give_up(error, writes_ended=writes_ended)
        report = transaction.failure_report(error)
        self._ended(report, error)
        return report

    def _ended(self, report: UpdateReport, error: EnginePluginError | None = None) -> None:
        self._answers.keep(report, error)
        self._records.drop()


def _nothing_prepared(request_id: str) -> UnknownIdError:
    return UnknownIdError(
        f"nothing is prepared under request_id {request_id[:80]!r}",
        remedy="POST /admin/v1/weights/prepare first",
    )


def _mode_in_two_phases(body: UpdateBody, plan: PlanSummary) -> ModeChoice:
    """Staged: the old weights serve until the commit; unless a push goes into live parameters."""
    if plan.direction == "push" and plan.direct_bytes:
        if body.mode == "staged":
            raise UnsupportedError(
                f"this push writes {plan.direct_bytes} bytes into live parameters, so the old "
                "weights cannot serve until the commit",
                remedy="prepare with mode auto or in_place",
            )
        return ModeChoice(False, "a push into live parameters")
    if body.mode == "in_place" and plan.direction == "pull":
        raise UnsupportedError(
            "what is prepared waits in a receive buffer: that is mode staged",
            remedy="prepare with mode auto or staged, or POST /admin/v1/weights/update",
        )
    return ModeChoice(True, "what is prepared waits for its commit")


def _refuse_verify(body: UpdateBody) -> None:
    if body.verify != "none":
        raise UnsupportedError(
            f"verify {body.verify} is not built yet", remedy="update with verify none"
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
