"""One call in, one answer out: how the admin side speaks with the receiver in a worker.

Both sides are bytes of plain data, so an engine needs a single method to carry them, and nothing
is ever raised across its RPC: an exception in one worker leaves the answers of the others behind
in some engines, to be taken for those of the next call.
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
from typing import Any, TypeVar

import msgspec

from engine_plugins import errors
from engine_plugins.errors import (
    AdminRequestError,
    EngineCallError,
    EnginePluginError,
    OutdatedError,
    ServerFilesError,
)
from engine_plugins.scarce import explained
from engine_plugins.shared_page import SharedPage
from engine_plugins.weights.contract.destinations import Destination
from engine_plugins.weights.contract.manifest_reader import ManifestReader
from engine_plugins.weights.contract.report import RankPlan, RankReport
from engine_plugins.weights.receiving.connection import Direction
from engine_plugins.weights.receiving.receiver import WeightReceiver
from engine_plugins.weights.receiving.staging import StagingRoom
from engine_plugins.weights.receiving.update_run import PullStatus

__all__ = [
    "BUSY_SINCE",
    "GENERATION",
    "AbortAnswer",
    "ConnectAnswer",
    "Failure",
    "PullNote",
    "StatusAnswer",
    "WorkerDescription",
    "WorkerService",
    "answer_call",
    "encode_call",
    "pull_page",
    "raised",
    "read_answer",
    "refuse",
]

T = TypeVar("T")

GENERATION = "_generation"
"""Beside a call's arguments: the generation of the operation that makes it, see `SharedState`."""
BUSY_SINCE = 0
"""Which gauge of a rank's page says since when it is in a call: monotonic microseconds, or 0."""
_PAGE_BYTES = 64 << 10
_MESSAGE_CHARACTERS = 3000
"""Of an error: a status has to fit its page, of which half is one status, in any alphabet."""
_ERRORS: dict[str, type[EnginePluginError]] = {
    name: getattr(errors, name)
    for name in errors.__all__
    # A client's account of an HTTP answer; no worker raises it.
    if name != "AdminAnswerError"
}


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An error as plain data; `kind` is the class's name in `engine_plugins.errors`."""

    kind: str
    message: str
    remedy: str


class WorkerDescription(msgspec.Struct, frozen=True, kw_only=True):
    """Who a worker is."""

    tp_rank: int
    pid: int
    host: str


class ConnectAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's plan, and the names that it has no use for."""

    plan: RankPlan
    unused: list[str]
    plan_s: float
    connect_s: float
    destination: Destination | None = None
    wanted: dict[str, list[str]] = {}
    """Tensors that must come in another dtype, by its name; then the plan is empty."""


class PullNote(msgspec.Struct, frozen=True, kw_only=True):
    """Where a pull tells how far it is, without a call to its engine."""

    page: str
    """Path of a `SharedPage`, whose bytes are the newest `StatusAnswer`."""
    number: int
    """Which pull of its process: the page may still tell of an earlier one."""
    pid: int


class StatusAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Where an update stands on one rank."""

    tp_rank: int
    steps_installed: int
    steps_total: int
    bytes_done: int
    bytes_total: int
    may_begin: bool
    """Whether nothing more can come without the engine standing still."""
    failure: Failure | None
    note: PullNote | None
    """`None` where there is no page, and the engine has to be asked."""


class AbortAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Whether live weights had been touched when the update was given up."""

    wrote: bool
    lost: bool = False
    """Whether bytes may still land in live weights, at any time."""


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    value: msgspec.Raw = msgspec.Raw(b"\xc0")
    failure: Failure | None = None


def encode_call(**arguments: Any) -> bytes:
    """Arguments of a call, as the bytes that travel."""
    return msgspec.msgpack.encode(arguments)


def read_answer(body: bytes, kind: type[T]) -> T:
    """A worker's answer.

    Raises:
        EnginePluginError: the error that the worker met, in its own class where it is one of ours.
        EngineCallError: the bytes are no answer to this call.
    """
    try:
        answer = msgspec.msgpack.decode(body, type=_Answer)
        if answer.failure is None:
            return msgspec.msgpack.decode(answer.value, type=kind)
    except msgspec.MsgspecError as error:
        raise EngineCallError(
            f"a rank's answer cannot be read: {error}",
            remedy="have every process of the server run the same release of engine-plugins",
        ) from error
    raise raised(answer.failure)


def raised(failure: Failure) -> EnginePluginError:
    """The error that a `Failure` describes."""
    kind = _ERRORS.get(failure.kind, EngineCallError)
    return kind(failure.message, remedy=failure.remedy)


def refuse(error: EnginePluginError) -> bytes:
    """The answer to a call that met an error before it reached a service."""
    return msgspec.msgpack.encode(_Answer(failure=_failure(error)))


def answer_call(
    calls: Mapping[str, Callable[..., Any]],
    name: str,
    arguments: bytes,
    *,
    who: str,
    admit: Callable[[int], None] = lambda generation: None,
) -> bytes:
    """Answer one call of those that there are; never raises. Errors name `who` met them.

    Args:
        calls: what can be called.
        name: of the call.
        arguments: from `encode_call`.
        who: answers.
        admit: raises where a call of this generation comes too late.
    """
    try:
        method = calls.get(name)
        if method is None:
            raise AdminRequestError(f"{who} knows no call {name!r}")
        given = msgspec.msgpack.decode(arguments)
        generation = given.pop(GENERATION, None)
        if generation is not None:
            admit(generation)
        value = msgspec.msgpack.encode(method(**given))
    except EnginePluginError as error:
        return refuse(error)
    except Exception as error:  # whatever the engine raised must travel as data
        told = explained(error)
        kind = ServerFilesError if isinstance(told, ServerFilesError) else EngineCallError
        remedy = told.remedy or "see the engine's log"
        return refuse(kind(f"{who}: {name}: {told.message}", remedy=remedy))
    return msgspec.msgpack.encode(_Answer(value=msgspec.Raw(value)))


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
            answer = msgspec.structs.replace(answer, failure=_cut(answer.failure))
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
            failure=None if status.error is None else _failure(status.error),
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


def _failure(error: EnginePluginError) -> Failure:
    return Failure(
        kind=type(error).__name__, message=_plain(error.message), remedy=_plain(error.remedy)
    )


def _plain(text: str) -> str:
    """Text that can be encoded: a path that is no UTF-8 has characters that nothing encodes."""
    return text.encode(errors="backslashreplace").decode()


def _cut(failure: Failure) -> Failure:
    return Failure(
        kind=failure.kind,
        message=failure.message[:_MESSAGE_CHARACTERS],
        remedy=failure.remedy[:_MESSAGE_CHARACTERS],
    )
