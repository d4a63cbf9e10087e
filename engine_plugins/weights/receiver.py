"""The engine-side receiver of one rank: connect, pull in a thread, install when told.

The engine's process calls short methods (`connect`, `start`, `poll`, `advance`, `finish`,
`abort`); the pull runs in a thread, so that the engine goes on meanwhile. Fetched modules wait in
a registered arena until `advance` hands them to the engine's loader. An arena that holds one
module and a little more bounds the memory (in place); one that holds all of them keeps the old
weights serving until everything is here (staged).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from engine_plugins.errors import ConflictError, EnginePluginError, UnknownIdError
from engine_plugins.weights.coverage import LoaderRules, engine_steps
from engine_plugins.weights.loader_trace import LoaderTrace, LogicalTensor
from engine_plugins.weights.manifest import SourceManifest
from engine_plugins.weights.needed import needed_boxes
from engine_plugins.weights.peak_memory import PeakMemory
from engine_plugins.weights.plan import FetchPlan, build_plan, coalesced, logical_tensors
from engine_plugins.weights.prepared_fetch import PreparedFetch
from engine_plugins.weights.report import RankPlan, RankReport
from engine_plugins.weights.transport.base import Transport

__all__ = ["PullStatus", "WeightInstaller", "WeightReceiver"]


class WeightInstaller(LoaderRules, Protocol):
    """What an engine must supply: its own loader, once on placeholders and once for real."""

    def trace(self, tensors: Sequence[LogicalTensor]) -> LoaderTrace:
        """Record what the engine's loader does with these tensors; touches nothing live."""
        ...

    def begin(self) -> None:
        """Make the model ready for new weights; generation stands still from here on."""
        ...

    def install(self, modules: Sequence[str], tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load whole HF tensors that fill `modules`; keeps no reference to them afterwards."""
        ...

    def finish(self) -> None:
        """End the load; every derived copy is of the new weights."""
        ...

    def abandon(self) -> None:
        """Leave a model that can be loaded again, after a failure between begin and finish."""
        ...


@dataclass(frozen=True, kw_only=True)
class PullStatus:
    """Where an update stands on this rank."""

    steps_ready: int
    steps_installed: int
    steps_total: int
    bytes_done: int
    bytes_total: int
    wrote: bool
    """Whether a live parameter has been touched: from here on only success keeps it serving."""
    error: EnginePluginError | None


class WeightReceiver:
    """All updates of one engine rank. Called from one thread; the pull has its own.

    Args:
        installer: the engine's side of loading.
        transport: makes the agent of this process when the first plan needs it.
        tp_rank: this rank, as errors will name it.
        stall_timeout_s: a pull that moves no byte for so long is given up.
    """

    def __init__(
        self,
        installer: WeightInstaller,
        transport: Callable[[], Transport],
        *,
        tp_rank: int,
        stall_timeout_s: float,
    ) -> None:
        self._installer = installer
        self._make_transport = transport
        self._transport: Transport | None = None
        self._tp_rank = tp_rank
        self._stall_timeout_s = stall_timeout_s
        self._plans: dict[str, tuple[FetchPlan, Sequence[SourceManifest]]] = {}
        self._fetch: tuple[str, PreparedFetch] | None = None
        self._run: _Run | None = None
        self._traced: tuple[tuple[LogicalTensor, ...], LoaderTrace] | None = None

    def connect(self, plan_id: str, manifests: Sequence[SourceManifest]) -> ConnectResult:
        """Plan the fetch of this rank and meet the peers.

        Raises:
            WeightMismatchError: names, shapes or dtypes do not fit the engine's model.
            PlanError: the sources leave a gap or overlap.
            PeerError: a source cannot be met.
        """
        self._refuse_while_running()
        planning = time.perf_counter()
        tensors = logical_tensors(manifests)
        trace = self._trace(tensors)
        steps, unused = engine_steps(trace, tensors, self._installer)
        plan = build_plan(manifests, coalesced(steps), needed_boxes(trace, tensors))
        connecting = time.perf_counter()
        fetch = self._prepare(plan_id, plan, manifests, staged=False)
        self._plans[plan_id] = (plan, manifests)
        return ConnectResult(
            plan=_rank_plan(plan, self._tp_rank, fetch.arena_bytes),
            unused=unused,
            plan_s=connecting - planning,
            connect_s=time.perf_counter() - connecting,
        )

    def drop(self, plan_id: str) -> None:
        """Forget a plan and its receive buffer."""
        self._refuse_while_running()
        self._plans.pop(plan_id, None)
        if self._fetch is not None and self._fetch[0] == plan_id:
            self._release()

    def start(self, plan_id: str, *, staged: bool, timeout_s: float) -> PullStatus:
        """Begin to pull. The engine's weights are untouched until `advance`."""
        self._refuse_while_running()
        if plan_id not in self._plans:
            raise UnknownIdError(
                f"rank {self._tp_rank} holds no plan {plan_id}", remedy="connect again"
            )
        plan, manifests = self._plans[plan_id]
        memory = PeakMemory.start(already_held=self._held_bytes())
        fetch = self._prepare(plan_id, plan, manifests, staged=staged)
        deadline = time.monotonic() + timeout_s
        self._run = _Run(fetch, memory, deadline, self._stall_timeout_s, self._tp_rank)
        return self._run.status()

    def poll(self) -> PullStatus:
        """Where the update stands; never blocks."""
        return self._current().status()

    def advance(self, *, budget_s: float) -> PullStatus:
        """Install what is here, waiting for more, for about `budget_s` seconds.

        Raises:
            EnginePluginError: the pull failed, or the engine refused to load a module.
        """
        run = self._current()
        until = time.monotonic() + budget_s
        if not run.wrote:
            run.wrote = True
            self._installer.begin()
        while run.installed < run.total and time.monotonic() < until:
            step = run.next_ready(until)
            if step is None:
                break
            with run.installing():
                self._installer.install(*step)
        return run.status()

    def finish(self) -> RankReport:
        """End an update of which every step is installed.

        Raises:
            ConflictError: some are not; ending here would serve a mixture.
        """
        run = self._current()
        if run.installed < run.total:
            raise ConflictError(
                f"rank {self._tp_rank} has {run.installed} of {run.total} modules installed",
                remedy="advance until all are installed, or abort",
            )
        with run.timed_install():
            self._installer.finish()
        self._run = None
        return RankReport(
            tp_rank=self._tp_rank,
            pid=os.getpid(),
            bytes_moved=run.bytes_done,
            wire_s=run.wire_s,
            install_s=run.install_s,
            peak_extra_bytes=run.memory.peak_extra_bytes(),
        )

    def abort(self) -> bool:
        """Stop the update under way, if any; say whether live weights had been touched."""
        run, self._run = self._run, None
        if run is None:
            return False
        still_landing = not run.stop()
        # First of all: whatever becomes of the engine, this memory must not be used again.
        if still_landing or run.lost_track_of_buffer:
            self._quarantine()
        if run.wrote:
            self._installer.abandon()
        return run.wrote

    def close(self) -> None:
        """Release the arena and the agent."""
        self.abort()
        self._release()
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def _trace(self, tensors: Sequence[LogicalTensor]) -> LoaderTrace:
        """The engine's trace; a trainer that connects anew has the tensors that it had before."""
        key = tuple(tensors)
        if self._traced is None or self._traced[0] != key:
            self._traced = (key, self._installer.trace(tensors))
        return self._traced[1]

    def _refuse_while_running(self) -> None:
        if self._run is not None:
            raise ConflictError(
                f"rank {self._tp_rank} is in the middle of an update",
                remedy="wait for it, or abort it",
            )

    def _current(self) -> _Run:
        if self._run is None:
            raise ConflictError(
                f"rank {self._tp_rank} has no update under way", remedy="start one first"
            )
        return self._run

    def _prepare(
        self, plan_id: str, plan: FetchPlan, manifests: Sequence[SourceManifest], *, staged: bool
    ) -> PreparedFetch:
        """The prepared fetch of a plan; kept from update to update while it fits."""
        if self._fetch is not None:
            known, fetch = self._fetch
            if known == plan_id and fetch.staged == staged and fetch.usable:
                return fetch
        self._release()
        if self._transport is None:
            self._transport = self._make_transport()
        fetch = PreparedFetch(plan, manifests, self._transport, staged=staged)
        self._fetch = (plan_id, fetch)
        return fetch

    def _held_bytes(self) -> int:
        """Of the receive buffer, what an earlier update has made resident."""
        if self._fetch is None or not self._fetch[1].touched:
            return 0
        return self._fetch[1].arena_bytes

    def _release(self) -> None:
        known, self._fetch = self._fetch, None
        if known is not None:
            known[1].close()

    def _quarantine(self) -> None:
        if self._fetch is not None:
            self._fetch[1].quarantine()
            self._fetch = None


@dataclass(frozen=True, kw_only=True)
class ConnectResult:
    """What a rank answers to `connect`."""

    plan: RankPlan
    unused: list[str]
    """HF names that reached no parameter of this rank and are not known to be ignorable."""
    plan_s: float
    connect_s: float


class _Run:
    """One update under way: the pull thread and what the two sides tell each other."""

    def __init__(
        self,
        fetch: PreparedFetch,
        memory: PeakMemory,
        deadline: float,
        stall_timeout_s: float,
        tp_rank: int,
    ) -> None:
        self.memory = memory
        self.installed = 0
        self.install_s = 0.0
        self.wrote = False
        self.total = len(fetch.plan.steps)
        self.lost_track_of_buffer = False
        self._fetch = fetch
        self._deadline = deadline
        self._stall_timeout_s = stall_timeout_s
        self._tp_rank = tp_rank
        self._ready = 0
        self._error: EnginePluginError | None = None
        self._stopped = False
        self._news = threading.Condition()
        fetch.reset_counters()
        self._thread = threading.Thread(target=self._pull, name="weight-pull", daemon=True)
        self._thread.start()

    @property
    def bytes_done(self) -> int:
        return self._fetch.bytes_done

    @property
    def wire_s(self) -> float:
        return self._fetch.wire_s

    def status(self) -> PullStatus:
        with self._news:
            return PullStatus(
                steps_ready=self._ready,
                steps_installed=self.installed,
                steps_total=self.total,
                bytes_done=self._fetch.bytes_done,
                bytes_total=self._fetch.bytes_total,
                wrote=self.wrote,
                error=self._error,
            )

    def next_ready(
        self, until: float
    ) -> tuple[Sequence[str], list[tuple[str, torch.Tensor]]] | None:
        """The next module that is here in full; None when `until` passes first."""
        with self._news:
            while self._ready <= self.installed and self._error is None:
                left = until - time.monotonic()
                if left <= 0:
                    return None
                self._news.wait(left)
            if self._ready <= self.installed and self._error is not None:
                raise self._error
        step = self._fetch.plan.steps[self.installed]
        return step.modules, self._fetch.tensors(self.installed)

    @contextmanager
    def timed_install(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.install_s += time.perf_counter() - began

    @contextmanager
    def installing(self) -> Iterator[None]:
        """Around one install: when it is done the step's bytes may be overwritten."""
        with self.timed_install():
            yield
        with self._news:
            self.installed += 1
            self._news.notify_all()

    def stop(self) -> bool:
        """Ask the pull to end; False when it has not within two seconds."""
        with self._news:
            self._stopped = True
            self._news.notify_all()
        self._thread.join(2.0)
        return not self._thread.is_alive()

    def _pull(self) -> None:
        try:
            self._pull_steps()
        except EnginePluginError as error:
            self._fail(error)
        except Exception as error:  # a thread's failure must reach whoever polls
            self._fail(EnginePluginError(f"{type(error).__name__}: {error}"))

    def _pull_steps(self) -> None:
        while self._ready < self.total:
            if not self._wait_for_room(self._ready):
                return
            steps = self._fetch.steps_with_room(self._ready, self.installed)
            self._fetch.run_steps(
                steps,
                stall_timeout_s=self._stall_timeout_s,
                deadline=self._deadline,
                cancelled=lambda: self._stopped,
            )
            with self._news:
                self._ready = steps.stop
                self._news.notify_all()

    def _wait_for_room(self, index: int) -> bool:
        needed = self._fetch.windows[index].installed_before
        with self._news:
            self._news.wait_for(lambda: self._stopped or self.installed >= needed)
            return not self._stopped

    def _fail(self, error: EnginePluginError) -> None:
        error.message = f"rank {self._tp_rank}: {error.message}"
        with self._news:
            self._error = error
            self.lost_track_of_buffer = self._fetch.reads_may_be_active
            self._news.notify_all()


def _rank_plan(plan: FetchPlan, tp_rank: int, arena_bytes: int) -> RankPlan:
    moved = sum(step.bytes_to_move for step in plan.steps)
    needed = sum(step.bytes_needed for step in plan.steps)
    return RankPlan(
        tp_rank=tp_rank,
        bytes_needed=needed,
        bytes_to_move=moved,
        operations=sum(step.operations for step in plan.steps),
        direct_bytes=0,
        staged_bytes=0,
        loader_bytes=needed,
        steps=len(plan.steps),
        largest_step_bytes=plan.largest_step_bytes,
        arena_bytes=arena_bytes,
    )
