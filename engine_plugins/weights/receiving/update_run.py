"""One update under way on one rank: the pull thread, and what it and the engine tell each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch

from engine_plugins.errors import EnginePluginError
from engine_plugins.weights.hardware.peak_memory import PeakMemory
from engine_plugins.weights.planning.plan_data import FetchPlan, Step
from engine_plugins.weights.planning.ring import Window
from engine_plugins.weights.transport.transfers import DRAIN_S

__all__ = ["STOP_S", "PreparedPlan", "PullStatus", "UpdateRun"]

STOP_S = DRAIN_S + 2.0
"""How long a pull may take to end once it is told to: what is under way, and a little more."""

TELL_S = 0.05
"""How often a pull tells how many bytes it has."""


class PreparedPlan(Protocol):
    """A plan with its memory: one that pulls, or one that trainers write to."""

    plan: FetchPlan
    staged: bool
    """Whether nothing that is installed makes room for what comes later."""
    touched: bool
    """Whether bytes have come into the arena, which makes it resident."""
    reads_may_be_active: bool
    """Whether bytes may still come in, at any time."""
    landings_may_be_active: bool
    """Whether they may come into live parameters."""
    bytes_done: int
    bytes_total: int
    wire_s: float

    @property
    def usable(self) -> bool:
        """Whether it may be run again."""
        ...

    @property
    def arena_bytes(self) -> int: ...
    @property
    def windows(self) -> Sequence[Window]: ...
    def reset_counters(self) -> None: ...
    def greet(
        self,
        word: int | None,
        *,
        stall_timeout_s: float,
        deadline: float,
        cancelled: Callable[[], bool],
    ) -> None: ...
    def check(
        self, *, stall_timeout_s: float, deadline: float, cancelled: Callable[[], bool]
    ) -> None: ...
    def confirm(self) -> None: ...
    def look(self) -> None: ...
    def tensors(self, index: int) -> list[tuple[str, torch.Tensor]]: ...
    def steps_with_room(self, index: int, installed: int) -> range: ...
    def run_steps(
        self,
        steps: range,
        *,
        stall_timeout_s: float,
        deadline: float,
        cancelled: Callable[[], bool],
    ) -> None: ...
    def close(self) -> None: ...
    def quarantine(self, pulling: Callable[[], bool]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class PullStatus:
    """Where an update stands on this rank."""

    steps_ready: int
    steps_installed: int
    steps_total: int
    bytes_done: int
    bytes_total: int
    may_begin: bool
    """Whether nothing more can come without the engine standing still."""
    wrote: bool
    """Whether a live parameter has been touched: from here on only success keeps it serving."""
    error: EnginePluginError | None


class _Limits(TypedDict):
    stall_timeout_s: float
    deadline: float
    cancelled: Callable[[], bool]


class UpdateRun:
    """The pull thread of one update.

    Args:
        prepared: what it runs.
        memory: the measurement of its peak.
        deadline: on the monotonic clock.
        stall_timeout_s: a pull that moves no byte for so long is given up.
        tp_rank: this rank, as errors will name it.
        tell: told in the pull's thread where it stands: at every step, at its end, and now and
            then in between.
        word: what the sources' version words must be; None takes what they are at the start.

    Attributes:
        installed: steps that are in the engine's model.
        staged_bytes: of them, what was copied from the arena without the loader.
        wrote: see `PullStatus`.
        lost_track_of_buffer: bytes may still come in, at any time.
        lost_track_of_live: bytes may still come into live parameters.
    """

    def __init__(
        self,
        prepared: PreparedPlan,
        memory: PeakMemory,
        *,
        deadline: float,
        stall_timeout_s: float,
        tp_rank: int,
        tell: Callable[[PullStatus], None],
        word: int | None = None,
    ) -> None:
        self.prepared = prepared
        self.memory = memory
        self.installed = 0
        self.install_s = 0.0
        self.staged_bytes = 0
        self.wrote = False
        self.total = len(prepared.plan.steps)
        self.lost_track_of_buffer = self.lost_track_of_live = False
        self._deadline = deadline
        self._stall_timeout_s = stall_timeout_s
        self._tp_rank = tp_rank
        self._tell = tell
        self._told_at = 0.0
        self._word = word
        self._ready = 0
        self._begun = False
        self._waits_to_begin = False
        self._error: EnginePluginError | None = None
        self._stopped = False
        self._news = threading.Condition()
        prepared.reset_counters()
        self._thread = threading.Thread(target=self._pull, name="weight-pull", daemon=True)

    def go(self) -> None:
        """Start to bring the steps in."""
        self._thread.start()

    def begin(self, begin: Callable[[], None]) -> None:
        """Have the engine made ready for new weights, once; live parameters may be written then."""
        if self.wrote:
            return
        self.wrote = True
        begin()
        with self._news:
            self._begun = True
            self._news.notify_all()

    def status(self) -> PullStatus:
        """Where the update stands."""
        with self._news:
            here = self._ready >= (self.total if self.prepared.staged else 1)
            return PullStatus(
                steps_ready=self._ready,
                steps_installed=self.installed,
                steps_total=self.total,
                bytes_done=self.prepared.bytes_done,
                bytes_total=self.prepared.bytes_total,
                may_begin=here or self._waits_to_begin,
                wrote=self.wrote,
                error=self._error,
            )

    def next_ready(self, until: float) -> tuple[Step, int] | None:
        """The next step that is here in full, and its number; None when `until` passes first."""
        with self._news:
            while self._ready <= self.installed and self._error is None:
                left = until - time.monotonic()
                if left <= 0:
                    return None
                self._news.wait(left)
            if self._ready <= self.installed and self._error is not None:
                raise self._error
        return self.prepared.plan.steps[self.installed], self.installed

    @contextmanager
    def timed_install(self) -> Iterator[None]:
        """Around what counts as installing."""
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
        """Ask the pull to end; False when it has not within `STOP_S`."""
        with self._news:
            self._stopped = True
            self._news.notify_all()
        if self._thread.ident is not None:
            self._thread.join(STOP_S)
        return not self.pulling()

    def pulling(self) -> bool:
        """Whether the pull's thread has not ended."""
        return self._thread.is_alive()

    def _pull(self) -> None:
        try:
            self._pull_steps()
        except EnginePluginError as error:
            self._fail(error)
        except Exception as error:  # a thread's failure must reach whoever polls
            self._fail(EnginePluginError(f"{type(error).__name__}: {error}"))

    def _pull_steps(self) -> None:
        limits: _Limits = {
            "stall_timeout_s": self._stall_timeout_s,
            "deadline": self._deadline,
            "cancelled": self._is_stopped,
        }
        self.prepared.greet(self._word, **limits)  # while the old weights are whole
        while self._ready < self.total:
            if not self._wait_for_room(self._ready):
                return
            steps = self.prepared.steps_with_room(self._ready, self.installed)
            self.prepared.run_steps(steps, **limits)
            if steps.stop == self.total:
                # Before the last step may be installed: of a staged update none is until then.
                self.prepared.check(**limits)
            with self._news:
                self._ready = steps.stop
                self._news.notify_all()
            self._tell(self.status())

    def _is_stopped(self) -> bool:
        """Asked all the time while bytes come in, so this is where their progress is told."""
        now = time.monotonic()
        if now - self._told_at >= TELL_S:
            self._told_at = now
            self._tell(self.status())
        return self._stopped

    def _wait_for_room(self, index: int) -> bool:
        needed = self.prepared.windows[index].installed_before
        direct = self.prepared.plan.steps[index].direct
        with self._news:
            self._waits_to_begin = direct
            if direct and not self._begun:
                self._tell(self.status())
            self._news.wait_for(
                lambda: self._stopped or (self.installed >= needed and (self._begun or not direct))
            )
            return not self._stopped

    def _fail(self, error: EnginePluginError) -> None:
        error.message = f"rank {self._tp_rank}: {error.message}"
        with self._news:
            self._error = error
            self.lost_track_of_buffer = self.prepared.reads_may_be_active
            self.lost_track_of_live = self.prepared.landings_may_be_active
            self._news.notify_all()
        self._tell(self.status())
