"""What travels between the admin side and a worker's receiver: calls, answers and errors, as data.

Nothing is ever raised across an engine's RPC: an exception in one worker leaves the answers of the
others behind in some engines, to be taken for those of the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from engine_plugins import errors
from engine_plugins.errors import (
    AdminRequestError,
    EngineCallError,
    EnginePluginError,
    ServerFilesError,
)
from engine_plugins.scarce import explained
from engine_plugins.weights.contract.destinations import Destination
from engine_plugins.weights.contract.report import RankPlan

__all__ = [
    "GENERATION",
    "AbortAnswer",
    "ConnectAnswer",
    "Failure",
    "PullNote",
    "StatusAnswer",
    "WorkerDescription",
    "answer_call",
    "encode_call",
    "failure_of",
    "raised",
    "read_answer",
    "refuse",
    "shortened",
]

T = TypeVar("T")

GENERATION = "_generation"
"""Beside a call's arguments: the generation of the operation that makes it, see `SharedState`."""
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
    return msgspec.msgpack.encode(_Answer(failure=failure_of(error)))


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


def failure_of(error: EnginePluginError) -> Failure:
    """An error as plain data, in characters that can be encoded."""
    return Failure(
        kind=type(error).__name__, message=_plain(error.message), remedy=_plain(error.remedy)
    )


def _plain(text: str) -> str:
    """Text that can be encoded: a path that is no UTF-8 has characters that nothing encodes."""
    return text.encode(errors="backslashreplace").decode()


def shortened(failure: Failure) -> Failure:
    """The same in a text that is not too long for a page."""
    return Failure(
        kind=failure.kind,
        message=failure.message[:_MESSAGE_CHARACTERS],
        remedy=failure.remedy[:_MESSAGE_CHARACTERS],
    )
