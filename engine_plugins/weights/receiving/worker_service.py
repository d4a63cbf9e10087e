"""One call in, one answer out: how the admin side speaks with the receiver in a worker.

Both sides are bytes of plain data (`worker_messages.py`), so an engine needs a single method to
carry them.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from engine_plugins.errors import OutdatedError
from engine_plugins.shared_page import SharedPage
from engine_plugins.weights.contract.manifest_reader import ManifestReader
from engine_plugins.weights.contract.report import RankReport
from engine_plugins.weights.receiving.connection import Direction
from engine_plugins.weights.receiving.receiver import WeightReceiver
from engine_plugins.weights.receiving.staging import StagingRoom
from engine_plugins.weights.receiving.update_run import PullStatus
from engine_plugins.weights.receiving.worker_messages import (
    AbortAnswer,
    ConnectAnswer,
    PullNote,
    StatusAnswer,
    WorkerDescription,
    answer_call,
    failure_of,
    shortened,
)

__all__ = ["BUSY_SINCE", "WorkerService", "pull_page"]

BUSY_SINCE = 0
"""Which gauge of a rank's page says since when it is in a call: monotonic microseconds, or 0."""
_PAGE_BYTES = 64 << 10


class WorkerService:
    """Answers the admin side's calls with one worker's receiver.

    Args:
        receiver: does what the calls say.
        tp_rank: this rank, as errors will name it.
        page: where pulls tell how far they are, see `pull_page`; None where no other process of the
            server could read it.
        calls: further calls of an engine, by name; what they return must be plain data.
        clear_kv: clears this rank's KV pages of what an engine's flush leaves there; told whether
            requests go on with what the pages hold.
        reach: told this server's address as its callers see it, before a plan is made; says
            whether the agents made so far cannot be reached there.
    """

    def __init__(
        self,
        receiver: WeightReceiver,
        *,
        tp_rank: int,
        page: Path | None,
        calls: Mapping[str, Callable[..., Any]] | None = None,
        clear_kv: Callable[[bool], None] | None = None,
        reach: Callable[[str], bool] | None = None,
    ) -> None:
        self._clear_kv = clear_kv
        self._reach = reach
        self._receiver = receiver
        self._tp_rank = tp_rank
        self._page_path = page
        self._page: SharedPage | None = None
        if page is not None:
            SharedPage.create(page, nbytes=_PAGE_BYTES)
            self._page = SharedPage(page)
        self._telling = threading.Lock()
        self._pull_number = 0
        self._generation = 0
        self._calls: dict[str, Callable[..., Any]] = {
            "describe": self._describe,
            "connect": self._connect,
            "manifest": self._manifest,
            "drop": self._drop,
            "staging_room": self._staging_room,
            "start": self._start,
            "poll": self._poll,
            "confirm": self._confirm,
            "look": self._look,
            "written": self._written,
            "advance": self._advance,
            "finish": self._finish,
            "abort": self._abort,
            **(calls or {}),
        }

    def call(self, name: str, arguments: bytes) -> bytes:
        """Answer one call; never raises."""
        who = f"rank {self._tp_rank}"
        with self._busy():
            return answer_call(self._calls, name, arguments, who=who, admit=self._admit)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Note on the page since when this rank is in a call: others can say so when it hangs."""
        if self._page is None:
            yield
            return
        self._page.gauges[BUSY_SINCE] = int(time.monotonic() * 1e6)
        try:
            yield
        finally:
            self._page.gauges[BUSY_SINCE] = 0

    def _admit(self, generation: int) -> None:
        """Refuse what a stopped process asks when it wakes up: another carries on for it.

        Raises:
            OutdatedError: the other one has called already.
        """
        if generation < self._generation:
            raise OutdatedError(
                f"rank {self._tp_rank} takes calls of generation {self._generation} by now, and "
                f"this one is of generation {generation}: another process has taken its place",
                remedy="GET /admin/v1/state says what the engine holds now",
            )
        self._generation = generation

    def _describe(self) -> WorkerDescription:
        return WorkerDescription(tp_rank=self._tp_rank, pid=os.getpid(), host=socket.gethostname())

    def _connect(
        self,
        plan_id: str,
        manifests: Sequence[bytes | str],
        direction: Direction = "pull",
        reached_at: str | None = None,
        tell_dtypes: bool = False,
    ) -> ConnectAnswer:
        """Manifests come as they are, or as paths of files on this host."""
        self._be_reachable(reached_at)
        reader = ManifestReader()
        bodies = (Path(each).read_bytes() if isinstance(each, str) else each for each in manifests)
        offers = [reader.read(body) for body in bodies]
        result = self._receiver.connect(
            plan_id, offers, direction=direction, tell_dtypes=tell_dtypes
        )
        return ConnectAnswer(
            plan=result.plan,
            unused=result.unused,
            plan_s=result.plan_s,
            connect_s=result.connect_s,
            destination=result.destination,
            wanted=result.wanted,
        )

    def _manifest(
        self, model: dict[str, str | int | bool], word: int, reached_at: str | None = None
    ) -> bytes:
        self._be_reachable(reached_at)
        return self._receiver.manifest(model, word)

    def _be_reachable(self, address: str | None) -> None:
        if address is not None and self._reach is not None and self._reach(address):
            self._receiver.renew_agent()

    def _drop(self, plan_id: str) -> None:
        self._receiver.drop(plan_id)

    def _staging_room(self, plan_id: str) -> StagingRoom:
        return self._receiver.staging_room(plan_id)

    def _start(
        self, plan_id: str, staged: bool, timeout_s: float, word: int | None = None
    ) -> StatusAnswer:
        with self._telling:
            self._pull_number += 1
        tell = functools.partial(self._tell, self._pull_number)
        status = self._receiver.start(
            plan_id, staged=staged, timeout_s=timeout_s, word=word, tell=tell
        )
        return self._answer(status)

    def _tell(self, number: int, status: PullStatus) -> None:
        """Write where a pull stands to the page, unless it is one that a later pull outlived."""
        if self._page is None:
            return
        answer = self._answer(status)
        if answer.failure is not None:
            answer = msgspec.structs.replace(answer, failure=shortened(answer.failure))
        body = msgspec.msgpack.encode(answer)
        with self._telling:
            if number == self._pull_number:
                self._page.write(body)

    def _confirm(self) -> StatusAnswer:
        return self._answer(self._receiver.confirm())

    def _look(self) -> StatusAnswer:
        return self._answer(self._receiver.look())

    def _poll(self) -> StatusAnswer:
        return self._answer(self._receiver.poll())

    def _advance(self, budget_s: float) -> StatusAnswer:
        return self._answer(self._receiver.advance(budget_s=budget_s))

    def _finish(self, keep_kv: bool = False) -> RankReport:
        report = self._receiver.finish()
        if self._clear_kv is not None:
            self._clear_kv(keep_kv)
        return report

    def _written(self) -> StatusAnswer:
        return self._answer(self._receiver.written())

    def _abort(self, writes_ended: bool | None = None) -> AbortAnswer:
        aborted = self._receiver.abort(writes_ended=writes_ended)
        return AbortAnswer(wrote=aborted.wrote, lost=aborted.lost)

    def _answer(self, status: PullStatus) -> StatusAnswer:
        return StatusAnswer(
            tp_rank=self._tp_rank,
            steps_installed=status.steps_installed,
            steps_total=status.steps_total,
            bytes_done=status.bytes_done,
            bytes_total=status.bytes_total,
            may_begin=status.may_begin,
            failure=None if status.error is None else failure_of(status.error),
            note=self._note,
        )

    @property
    def _note(self) -> PullNote | None:
        if self._page_path is None:
            return None
        return PullNote(page=str(self._page_path), number=self._pull_number, pid=os.getpid())


def pull_page(runtime_dir: Path, tp_rank: int) -> Path:
    """The page of a rank in its server's runtime directory."""
    return runtime_dir / "ranks" / f"tp{tp_rank}.page"
