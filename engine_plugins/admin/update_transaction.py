"""A weight update as a transaction: pull, pause, install, flush, publish, resume.

Until the first live parameter is touched a failure leaves the engine as it was. From then on only
completion may serve: a failure fences the engine. The version is published after the last cache
is flushed, so it never labels anything else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import msgspec

from engine_plugins.admin.engine_control import EngineControl
from engine_plugins.admin.pausing import pause_within
from engine_plugins.admin.schemas import UpdateBody
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import (
    EngineState,
    Fence,
    Pause,
    UpdateProgress,
    WeightsInstalled,
    moved,
)
from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.errors import EnginePluginError, TransferTimeoutError
from engine_plugins.weights.report import Phases, PlanSummary, RankReport, UpdateReport
from engine_plugins.weights.worker_service import StatusAnswer

__all__ = ["UpdateTransaction"]

logger = logging.getLogger(__name__)

POLL_S = 0.02
ADVANCE_S = 0.25
"""The longest that one call keeps an engine's core from answering others."""

GRACE_S = 0.5
"""After the deadline a rank may still say for itself which peer kept it waiting, and for what."""


class UpdateTransaction:
    """One update of one engine. The caller holds the operation lock throughout.

    Args:
        control: the engine.
        shared: the state that every process sees.
        body: what was asked.
        plan: the plan that it names.
        staged: whether everything is pulled before the engine is paused.
    """

    def __init__(
        self,
        control: EngineControl,
        shared: SharedState,
        body: UpdateBody,
        plan: PlanSummary,
        *,
        staged: bool,
    ) -> None:
        self._control = control
        self._workers = WorkerCalls(control)
        self._shared = shared
        self._body = body
        self._plan = plan
        self._staged = staged
        self._before = shared.read()
        self._paused_here = False
        self._touched = False
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()
        self._deadline = time.monotonic() + body.timeout_s
        self._still_since = self._began
        self._paused_s = 0.0

    async def run(self) -> UpdateReport:
        """Carry the update through.

        Raises:
            EnginePluginError: what went wrong; the engine serves its old weights, or is fenced
                and says so in its state.
        """
        try:
            await self._pull()
            await self._pause()
            await self._install()
            ranks = await self._finish()
            await self._flush()
            await self._publish()
        except EnginePluginError as error:
            await self._give_up(error)
            raise
        except Exception as error:  # an engine's own exception must not leave the state behind
            failure = EnginePluginError(f"{type(error).__name__}: {error}")
            await self._give_up(failure)
            raise failure from error
        return self._report(ranks)

    async def _pull(self) -> None:
        """Pull until nothing more can come without the engine standing still."""
        self._show("pull", 0)
        statuses = await self._workers.start(
            self._plan.plan_id, staged=self._staged, timeout_s=self._body.timeout_s
        )
        while not all(self._enough(status) for status in statuses):
            await asyncio.sleep(POLL_S)
            statuses = await self._workers.poll()
            self._progress("pull", statuses)

    def _enough(self, status: StatusAnswer) -> bool:
        return status.steps_ready >= (status.steps_total if self._staged else 1)

    async def _pause(self) -> None:
        if self._before.state != "serving":
            return
        self._show("pause", None)
        with self._timed("pause_s"):
            await pause_within(
                self._control, self._body.pause, max(self._deadline - time.monotonic(), 0.1)
            )
        self._paused_here = True
        self._still_since = time.perf_counter()

    async def _install(self) -> None:
        self._touched = True
        self._show("install", None)
        self._mark_new_kv()
        while True:
            statuses = await self._workers.advance(budget_s=ADVANCE_S)
            if all(status.steps_installed == status.steps_total for status in statuses):
                return
            self._progress("install", statuses)

    async def _finish(self) -> list[RankReport]:
        return await self._workers.finish()

    async def _flush(self) -> None:
        self._show("flush", None)
        recompute = self._body.in_flight_kv == "recompute"
        with self._timed("flush_s"):
            await self._control.flush(prefix_cache=recompute, multimodal_cache=self._body.flush)
            await self._control.isolate_kv()

    async def _publish(self) -> None:
        """The new version, on all processes at once; then serve, where that was asked."""
        await self._control.publish_version(self._body.version)
        resume = self._body.resume
        if resume is None:
            resume = self._before.pause is None
        weights = WeightsInstalled(
            version=self._body.version,
            request_id=self._body.request_id,
            installed_at=time.time(),
        )
        self._shared.change(lambda state: msgspec.structs.replace(state, weights=weights))
        if resume:
            self._show("resume", None)
            with self._timed("resume_s"):
                await self._control.resume()
        self._paused_s = time.perf_counter() - self._still_since
        left_paused = Pause(mode=self._body.pause, until=None)
        self._shared.change(
            lambda state: moved(
                state,
                "serving" if resume else "paused",
                update=None,
                fence=None,
                pause=None if resume else self._before.pause or left_paused,
            )
        )

    async def _give_up(self, error: EnginePluginError) -> None:
        """Back to the old weights if none was touched; otherwise behind a fence."""
        wrote = self._touched
        try:
            wrote = await self._workers.abort() or wrote
            if wrote:
                await self._fence(error)
                return
            if self._paused_here:
                await self._control.resume()
        except Exception:
            logger.exception("giving up an update met another error")
            if wrote:
                self._close_fence(error)
                return
        self._shared.change(
            lambda state: moved(
                state,
                self._before.state,
                pause=self._before.pause,
                fence=self._before.fence,
                update=None,
            )
        )
        error.remedy = error.remedy or "the old weights serve on; mend the cause and update again"

    async def _fence(self, error: EnginePluginError) -> None:
        self._close_fence(error)
        ended = await self._control.fail_requests()
        logger.error("engine fenced: %s; %d requests ended with an error", error.message, ended)

    def _close_fence(self, error: EnginePluginError) -> None:
        fence = Fence(
            code=error.code,
            detail=f"the update to version {self._body.version} failed half way: {error.message}",
            remedy=f"repeat the update to version {self._body.version} or send a newer one, under "
            "a new request_id",
            attempted_version=self._body.version,
        )
        self._shared.change(
            lambda state: moved(
                state,
                "fenced",
                fence=fence,
                update=None,
                weights=WeightsInstalled(),
            )
        )
        error.remedy = f"the engine is fenced; {fence.remedy}"

    def _mark_new_kv(self) -> None:
        """From here on no request may use KV of the weights before."""

        def change(state: EngineState) -> EngineState:
            # Counted, because the same version may come again with other weights.
            count = int((state.kv_generation or ".0").rpartition(".")[2]) + 1
            mark = f"weights-{self._body.version}.{count}"
            return msgspec.structs.replace(state, kv_generation=mark)

        self._shared.change(change)

    def _progress(self, phase: str, statuses: list[StatusAnswer]) -> None:
        done = sum(status.bytes_done for status in statuses)
        self._show(phase, done)
        if time.monotonic() > self._deadline + GRACE_S:
            slowest = min(statuses, key=lambda status: status.bytes_done)
            raise TransferTimeoutError(
                f"the update did not end within {self._body.timeout_s:g} s: rank "
                f"{slowest.tp_rank} has {slowest.bytes_done} of {slowest.bytes_total} bytes and "
                f"{slowest.steps_installed} of {slowest.steps_total} modules installed"
            )

    def _show(self, phase: str, bytes_done: int | None) -> None:
        def change(state: EngineState) -> EngineState:
            done = state.update.bytes_done if bytes_done is None and state.update else bytes_done
            progress = UpdateProgress(
                request_id=self._body.request_id,
                version=self._body.version,
                phase=phase,
                bytes_done=done or 0,
                bytes_total=self._plan.bytes_to_move,
            )
            if state.state == "updating":
                return msgspec.structs.replace(state, update=progress)
            return moved(state, "updating", update=progress)

        self._shared.change(change)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[phase] = time.perf_counter() - began

    def failure_report(self, error: EnginePluginError) -> UpdateReport:
        """The report of an update that failed, for the history."""
        return msgspec.structs.replace(
            self._report([]),
            outcome="failed",
            error={"code": error.code, "detail": error.message, "remedy": error.remedy},
        )

    def _report(self, ranks: list[RankReport]) -> UpdateReport:
        moved_bytes = sum(rank.bytes_moved for rank in ranks)
        wire_s = max((rank.wire_s for rank in ranks), default=0.0)
        mode: Literal["staged", "in_place"] = "staged" if self._staged else "in_place"
        return UpdateReport(
            version=self._body.version,
            request_id=self._body.request_id,
            plan_id=self._plan.plan_id,
            outcome="installed",
            mode=mode,
            bytes_moved=moved_bytes,
            bytes_needed=self._plan.bytes_needed,
            gbps=moved_bytes / 1e9 / wire_s if wire_s > 0 else 0.0,
            seconds=time.perf_counter() - self._began,
            paused_s=self._paused_s if self._paused_here else 0.0,
            phases=Phases(
                connect_s=self._plan.connect_s,
                plan_s=self._plan.plan_s,
                pull_s=wire_s,
                install_s=max((rank.install_s for rank in ranks), default=0.0),
                **self._seconds,
            ),
            peak_extra_bytes=max((rank.peak_extra_bytes for rank in ranks), default=0),
            ranks=ranks,
            finished_at=time.time(),
        )
