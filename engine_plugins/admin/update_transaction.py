"""A weight update as a transaction: pull, pause, install, flush, publish, resume.

In one go (`run`), or in two phases: `prepare` brings every byte here, `commit` has it serve.
Until the first live parameter is touched a failure leaves the engine as it was. From then on only
completion may serve: a failure fences the engine. The version is published after the last cache
is flushed, so it never labels anything else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Self

import msgspec

from engine_plugins.admin.bounded_control import bounded
from engine_plugins.admin.call_limits import UPDATE_GRACE_S
from engine_plugins.admin.engine_control import EngineControl
from engine_plugins.admin.giving_up import GivingUp
from engine_plugins.admin.pausing import pause_within
from engine_plugins.admin.pull_watch import PullWatch
from engine_plugins.admin.schemas import UpdateBody
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.shown_update import ShownUpdate
from engine_plugins.admin.state import Pause, WeightsInstalled, moved
from engine_plugins.admin.update_outcome import behind, failure_report, report_of
from engine_plugins.admin.update_record import UpdateRecord, UpdateRecords
from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.errors import (
    EnginePluginError,
    EngineStuckError,
    OutdatedError,
    TransferTimeoutError,
)
from engine_plugins.scarce import explained
from engine_plugins.weights.contract.report import PlanSummary, RankReport, UpdateReport
from engine_plugins.weights.receiving.staging import ModeChoice
from engine_plugins.weights.receiving.worker_messages import StatusAnswer
from engine_plugins.weights.transport.transfers import DRAIN_S

__all__ = ["UpdateTransaction"]

POLL_S = 0.02
ADVANCE_S = 0.25
"""The longest that one call keeps an engine's core from answering others."""

GRACE_S = 0.5
"""After the deadline a rank may still say for itself which peer kept it waiting, and for what."""


class UpdateTransaction:
    """One update of one engine. The caller holds the operation lock during every method.

    Args:
        control: the engine.
        shared: the state that every process sees.
        record: where the update stands; kept in the runtime directory from step to step.
    """

    def __init__(self, control: EngineControl, shared: SharedState, record: UpdateRecord) -> None:
        self._engine = bounded(control, shared)
        self._control = self._engine.until(lambda: self._record.deadline + UPDATE_GRACE_S)
        self._workers = WorkerCalls(self._control)
        self._giving_up = GivingUp(self._engine, shared, record)
        self._shown = ShownUpdate(shared, record)
        self._shared = shared
        self._records = UpdateRecords(shared)
        self._record = record
        self._body = record.body
        self._plan = record.plan
        self._paused_s = 0.0

    @classmethod
    def begin(
        cls,
        control: EngineControl,
        shared: SharedState,
        body: UpdateBody,
        plan: PlanSummary,
        mode: ModeChoice,
        *,
        waited_s: float = 0.0,
    ) -> Self:
        """A new update of the engine as it is now.

        Args:
            control: the engine.
            shared: the state that every process sees.
            body: what was asked.
            plan: the plan that it names.
            mode: whether every byte is here before the engine is paused.
            waited_s: for another call to end; it counts against `timeout_s`.
        """
        now = time.monotonic()
        asked_at = now - waited_s
        record = UpdateRecord(
            asked=body.model_dump(),
            plan=plan,
            staged=mode.staged,
            mode_reason=mode.reason,
            before=shared.read(),
            began=asked_at,
            deadline=asked_at + body.timeout_s,
            still_since=now,
            seconds={"wait_s": waited_s},
        )
        UpdateRecords(shared).keep(record)
        return cls(control, shared, record)

    async def run(self) -> UpdateReport:
        """Carry the update through.

        Raises:
            EnginePluginError: what went wrong; the engine serves its old weights, or is fenced
                and says so in its state.
        """
        async with self._or_give_up():
            await self._pull()
            await self._pause()
            ranks = await self._install()
        return self._installed(ranks)

    async def prepare(self) -> UpdateReport:
        """Have every byte here, or of a push the memory ready that the trainer writes to.

        The old weights serve on meanwhile and until `commit`; except where a push goes into live
        parameters, for which the engine is paused and only completion may serve.

        Raises:
            EnginePluginError: as for `run`.
        """
        async with self._or_give_up():
            statuses = await (self._open() if self._plan.direction == "push" else self._pull())
        done = sum(status.bytes_done for status in statuses)
        self._shown.phase("prepared", done)
        report = report_of(self._record, "prepared")
        self._record.prepared = msgspec.structs.replace(report, bytes_moved=done)
        self._records.keep(self._record)
        return self._record.prepared

    async def commit(self) -> UpdateReport:
        """Install what was prepared, within `timeout_s` from now.

        Raises:
            EnginePluginError: as for `run`.
        """
        self._record.prepared = None
        self._record.deadline = time.monotonic() + self._body.timeout_s
        self._records.keep(self._record)
        async with self._or_give_up():
            if self._plan.direction == "push":
                self._shown.phase("written", None)
                await self._until_ready("written", await self._workers.written())
            else:
                # A commit may come late, from a caller that has given up: nothing is touched yet.
                await self._workers.confirm()
            await self._pause()
            ranks = await self._install()
        return self._installed(ranks)

    def _installed(self, ranks: list[RankReport]) -> UpdateReport:
        return report_of(self._record, "installed", ranks, paused_s=self._paused_s)

    @asynccontextmanager
    async def _or_give_up(self) -> AsyncIterator[None]:
        try:
            yield
        except OutdatedError:
            raise  # whoever took this one's place has said what the engine holds
        except EnginePluginError as error:
            told = await self._giving_up.give_up(error)
            if told is error:
                raise
            raise told from error
        except Exception as error:  # an engine's own exception must not leave the state behind
            failure = explained(error)
            raise await self._giving_up.give_up(failure) from error

    async def _pull(self) -> list[StatusAnswer]:
        """Pull until nothing more can come without the engine standing still."""
        self._shown.phase("pull", 0)
        return await self._until_ready("pull", await self._start())

    async def _until_ready(self, phase: str, statuses: list[StatusAnswer]) -> list[StatusAnswer]:
        watch = PullWatch(self._workers, statuses)
        while not all(status.may_begin for status in statuses):
            await asyncio.sleep(POLL_S)
            statuses = await watch.look()
            self._progress(phase, statuses)
        return statuses

    async def _open(self) -> list[StatusAnswer]:
        """Make the memory ready that the trainer will write to."""
        self._shown.phase("open", 0)
        if self._plan.direct_bytes:
            await self._pause()
            self._touch()
        return await self._start()

    async def _start(self) -> list[StatusAnswer]:
        return await self._workers.start(
            self._plan.plan_id,
            staged=self._record.staged,
            timeout_s=self._body.timeout_s,
            word=self._body.source_word,
        )

    async def _pause(self) -> None:
        if self._record.before.state != "serving" or self._record.paused_here:
            return
        self._shown.phase("pause", None)
        left = max(self._record.deadline - time.monotonic(), 0.1)
        with self._timed("pause_s"):
            await pause_within(self._control, self._shared, self._body.pause, left)
        self._record.paused_here = True
        self._record.still_since = time.monotonic()

    async def _install(self) -> list[RankReport]:
        """Everything that follows once the engine stands still."""
        self._touch()
        self._shown.phase("install", None)
        while True:
            statuses = await self._workers.advance(budget_s=ADVANCE_S)
            if all(status.steps_installed == status.steps_total for status in statuses):
                break
            self._progress("install", statuses)
        ranks = await self._workers.finish(keep_kv=self._body.in_flight_kv == "keep")
        await self._flush()
        await self._publish()
        return ranks

    def _touch(self) -> None:
        """From here on only completion may serve, and no request may use KV of the old weights."""
        if self._record.touched:
            return
        self._record.touched = True
        self._records.keep(self._record)
        self._shown.mark_new_kv()

    async def _flush(self) -> None:
        self._shown.phase("flush", None)
        recompute = self._body.in_flight_kv == "recompute"
        with self._timed("flush_s"):
            await self._control.flush(prefix_cache=recompute, multimodal_cache=self._body.flush)
            await self._control.isolate_kv()

    async def _publish(self) -> None:
        """The new version, on all processes at once; then serve, where that was asked."""
        await self._control.publish_version(self._body.version)
        sleep = self._shared.read().sleep
        if sleep is not None:
            sleep = msgspec.structs.replace(sleep, weights_lost=False)
        asleep = sleep is not None and bool(sleep.released)
        resume = self._body.resume
        if resume is None:
            resume = self._record.before.pause is None if sleep is None else sleep.resume
        weights = WeightsInstalled(
            version=self._body.version,
            request_id=self._body.request_id,
            installed_at=time.time(),
        )
        self._shared.change(lambda state: msgspec.structs.replace(state, weights=weights))
        if resume and not asleep:
            self._shown.phase("resume", None)
            with self._timed("resume_s"):
                await self._control.resume()
        self._paused_s = time.monotonic() - self._record.still_since
        left_paused = Pause(mode=self._body.pause, until=None)
        self._shared.change(
            lambda state: moved(
                state,
                "asleep" if asleep else "serving" if resume else "paused",
                update=None,
                fence=None,
                sleep=msgspec.structs.replace(sleep, resume=resume) if sleep and asleep else None,
                pause=None if resume else self._record.before.pause or left_paused,
            )
        )

    def _progress(self, phase: str, statuses: list[StatusAnswer]) -> None:
        done = sum(status.bytes_done for status in statuses)
        self._shown.phase(phase, done)
        # While the engine serves, its core is not made to wait for reads that are let end: the
        # ranks do that by themselves.
        drain_s = 0.0 if phase == "install" else DRAIN_S
        if time.monotonic() > self._record.deadline + GRACE_S + drain_s:
            late = f"the update did not end within {self._body.timeout_s:g} s: "
            still = self._engine.health.processes.still()
            if still:
                raise EngineStuckError(late + still, remedy="let that process go on")
            raise TransferTimeoutError(late + behind(statuses))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._record.seconds[phase] = time.monotonic() - began

    def failure_report(self, error: EnginePluginError) -> UpdateReport:
        """The report of an update that failed, for the history."""
        return failure_report(self._record, error)
