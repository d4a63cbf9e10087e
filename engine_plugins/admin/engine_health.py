"""What this API process knows of the engine's health, and the calls that it has left open."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

from engine_plugins.admin.engine_processes import EngineProcesses
from engine_plugins.errors import EngineDeadError, EngineStuckError
from engine_plugins.shared_page import SharedPage
from engine_plugins.weights.receiving.worker_service import BUSY_SINCE, pull_page

__all__ = ["EngineHealth"]

logger = logging.getLogger(__name__)


class EngineHealth:
    """Shared by all calls that one API process makes.

    Args:
        processes: of the engine.
        engine_says: why the engine's own client holds it for dead, or None.
    """

    def __init__(
        self, processes: EngineProcesses, engine_says: Callable[[], str | None] = lambda: None
    ) -> None:
        self.processes = processes
        self.on_death: Callable[[str], None] = lambda why: None
        """Called with why the engine is dead, each time that it is seen."""
        self._engine_says = engine_says
        self._open: set[asyncio.Task[Any]] = set()
        self._late: set[asyncio.Task[Any]] = set()
        self._pages: dict[int, SharedPage] = {}

    @property
    def is_behind(self) -> bool:
        """Whether it owes the answer to a call that was given up, or is seen to be stopped."""
        return bool(self._late) or bool(self.processes.still())

    def death(self) -> EngineDeadError | None:
        """That the engine is dead, if it is."""
        why = self.processes.ended() or self._engine_says()
        if not why:
            return None
        self.on_death(f"the engine is dead: {why}")
        return EngineDeadError(
            f"the engine is dead: {why}",
            remedy="start the server anew; see its log for why the process ended",
        )

    def hold(self, task: asyncio.Task[Any]) -> None:
        """Keep a call until it is answered, whoever waits for it."""
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    def give_up(self, call: str, task: asyncio.Task[Any], *, after_s: float) -> EngineStuckError:
        """Wait for a call no longer; its answer goes to the log when it comes.

        Returns:
            The error for whoever waited: it names who stands still.
        """
        asked = time.monotonic() - after_s
        self._late.add(task)

        def answered(late: asyncio.Task[Any]) -> None:
            self._late.discard(late)
            if late.cancelled():
                return
            took = time.monotonic() - asked
            error = late.exception()
            what = "its answer" if error is None else f"{type(error).__name__}: {error}"
            logger.warning("%s was answered after %.1f s; nobody waits for %s", call, took, what)

        task.add_done_callback(answered)
        return EngineStuckError(
            f"the engine did not answer {call} within {after_s:.1f} s: {self.culprit()}",
            remedy="let that process go on, or start the server anew",
        )

    def culprit(self) -> str:
        """Who keeps the engine from answering, as far as can be seen from here."""
        unusual = self.processes.unusual()
        if unusual:
            return unusual
        named = self.processes.named() or "unknown"
        busy = self.busy_ranks(time.monotonic())
        in_it = f"; still in a call: {', '.join(busy)}" if busy else ""
        return f"none of its processes is stopped ({named}){in_it}"

    def busy_ranks(self, now: float) -> list[str]:
        """The ranks that have not come out of a call, by their pages."""
        found = []
        for rank in itertools.count():
            if rank not in self._pages:
                path = pull_page(self.processes.runtime_dir, rank)
                try:
                    self._pages[rank] = SharedPage(path)
                except OSError:
                    break
            since = self._pages[rank].gauges[BUSY_SINCE]
            if since:
                found.append(f"rank {rank} for {now - since / 1e6:.1f} s")
        return found
