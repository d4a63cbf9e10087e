"""Where the ranks of an update stand, read from their pages.

A call to the workers waits for the engine's step and takes the place of one, so none is made while
bytes come in and the old weights serve.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.shared_page import SharedPage
from engine_plugins.weights.receiving.worker_messages import (
    PullNote,
    StatusAnswer,
    raised,
)

__all__ = ["PullWatch"]

ALIVE_S = 1.0
"""How often it is looked whether the ranks' processes are there: a dead one tells nothing more."""


class PullWatch:
    """Watches one pull on every rank.

    Args:
        workers: asked when a rank's process is gone, which nobody else can explain; and where there
            are ranks without a page.
        statuses: what the ranks answered when they began.
    """

    def __init__(self, workers: WorkerCalls, statuses: Sequence[StatusAnswer]) -> None:
        self._workers = workers
        self._ranks: list[_Rank] = []
        with suppress(OSError):  # no descriptor left, or the runtime directory was removed
            self._ranks = [_Rank(status, status.note) for status in statuses if status.note]
        self._all_tell = len(self._ranks) == len(statuses)
        self._alive_at = time.monotonic()

    async def look(self) -> list[StatusAnswer]:
        """Where each rank stands.

        Raises:
            EnginePluginError: the failure of a pull, or what the engine said of a rank that ended.
        """
        if not self._all_tell:
            return await self._workers.poll()
        if time.monotonic() - self._alive_at >= ALIVE_S:
            self._alive_at = time.monotonic()
            if not all(rank.is_alive for rank in self._ranks):
                return await self._workers.poll()
        statuses = [rank.look() for rank in self._ranks]
        for status in statuses:
            if status.failure is not None:
                raise raised(status.failure)
        return statuses


class _Rank:
    def __init__(self, status: StatusAnswer, note: PullNote) -> None:
        self._status = status
        self._number = note.number
        self._page = SharedPage(Path(note.page))
        self._seen = 0
        self._process: psutil.Process | None = None
        with suppress(psutil.NoSuchProcess):
            self._process = psutil.Process(note.pid)

    @property
    def is_alive(self) -> bool:
        """A zombie is as dead as one that was waited for."""
        if self._process is None:
            return False
        try:
            return self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except OSError:  # no descriptor left to look with
            return True

    def look(self) -> StatusAnswer:
        """The newest of this pull; the page may hold one of the pull before."""
        if self._page.sequence != self._seen:
            self._seen, body = self._page.read()
            told = msgspec.msgpack.decode(body, type=StatusAnswer)
            if told.note is not None and told.note.number == self._number:
                self._status = told
        return self._status
