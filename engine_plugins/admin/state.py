"""The states of an engine and the moves between them."""

from __future__ import annotations

import logging
import time
from typing import Literal

import msgspec

from engine_plugins.admin.engine_control import PauseMode
from engine_plugins.admin.engine_processes import has_ended
from engine_plugins.errors import ConflictError
from engine_plugins.sleep.memory_backend import MemoryTag

__all__ = [
    "EngineState",
    "Fence",
    "Holder",
    "Pause",
    "Sleep",
    "StateName",
    "UpdateProgress",
    "WeightsInstalled",
    "carrier_stopped",
    "given_up_for_dead",
    "moved",
    "not_now",
    "overdue",
    "refusal",
    "refuse_for_good",
    "require",
    "require_weights_mapped",
    "short",
]

logger = logging.getLogger(__name__)

MOST_TEXT_BYTES = 4 << 10
"""Of one text on the page, whatever an engine's error says: the page has room for all of them."""

StateName = Literal["serving", "paused", "updating", "asleep", "fenced"]

_WAY_OUT: dict[StateName, str] = {
    "serving": "GET /admin/v1/state, and call what its state allows",
    "paused": "POST /admin/v1/resume",
    "updating": "wait until the update has ended",
    "asleep": "POST /admin/v1/wake",
    "fenced": "complete a weight update: POST /admin/v1/weights/update",
}


def short(text: str) -> str:
    """A text that fits the page and can be encoded; what is cut off is in the log."""
    if len(text) <= MOST_TEXT_BYTES // 4 and text.isascii():
        return text
    body = text.encode(errors="backslashreplace")
    if len(body) <= MOST_TEXT_BYTES:
        return body.decode()
    logger.warning("a text of %d bytes is cut for the state; the whole: %s", len(body), text)
    note = f" ... (cut: {len(body)} bytes, all of them in the server's log)"
    return body[: MOST_TEXT_BYTES - len(note)].decode(errors="ignore") + note


class _ShortTexts(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the state whose texts are cut, so that writing it cannot fail for its size."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            text = getattr(self, name)
            if isinstance(text, str):
                msgspec.structs.force_setattr(self, name, short(text))


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """A pause that a caller asked for."""

    mode: PauseMode
    until: float | None
    """Unix seconds at which it ends by itself (`hold_s`); None: only a resume ends it."""
    ends_at: float | None = None
    """The same by the monotonic clock of this host, which nobody sets back."""

    def beside(self, other: Pause | None) -> Pause:
        """This pause while another caller's lasts: over when no pause is left."""
        if other is None:
            return self
        if self.ends_at is None or other.ends_at is None:
            return msgspec.structs.replace(self, until=None, ends_at=None)
        return self if self.ends_at >= other.ends_at else other


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """The process that asks the engine for a pause, from before it asks.

    Until the state has the pause, nothing else says that the engine may stand still: if the process
    dies meanwhile, `pausing.end_left_pause` has the engine serve again.
    """

    pid: int
    started: int | None
    """Its start, in clock ticks from boot: pids are used again."""
    serial: str
    """Of this one pause: a pause that was given up late must not end the next one's hold."""
    drains: bool
    """New requests wait in the API processes while those in the engine end."""

    @property
    def lives(self) -> bool:
        """Whether the process is still there, as far as can be found out."""
        return not has_ended(self.pid, self.started)


class WeightsInstalled(_ShortTexts, frozen=True, kw_only=True):
    """The weights that serve; `version` is None for those that the engine was started with."""

    version: int | None = None
    request_id: str | None = None
    installed_at: float | None = None
    digest: str | None = None


class Fence(_ShortTexts, frozen=True, kw_only=True):
    """Why the engine refuses to serve."""

    code: str
    detail: str
    remedy: str
    attempted_version: int
    """Version whose update failed half way; that one or a newer one lifts the fence."""
    for_good: bool = False
    """Whether only a restart of the engine helps."""


class UpdateProgress(_ShortTexts, frozen=True, kw_only=True):
    """The update under way."""

    request_id: str
    version: int
    phase: str
    bytes_done: int
    bytes_total: int


class Sleep(_ShortTexts, frozen=True, kw_only=True):
    """A sleep that has not ended."""

    level: int
    """1: weights come back at wake. 2: they are gone, and an update has to bring others."""
    released: list[MemoryTag]
    """What is out of memory now."""
    since: float
    resume: bool
    """Whether the engine served before, and will again when it is awake."""
    weights_lost: bool = False
    """The weights hold nothing of use until an update completes."""
    verdict: str | None = None
    """Of the residual-memory check: pass, fail or unknown; None while it is under way."""
    reason: str | None = None


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """What every process of the server knows."""

    state: StateName = "serving"
    since: float
    pause: Pause | None = None
    weights: WeightsInstalled = WeightsInstalled()
    fence: Fence | None = None
    update: UpdateProgress | None = None
    sleep: Sleep | None = None
    kv_life: str | None = None
    """Names this life of the server, in no other life again."""
    kv_generation: str | None = None
    """Which weights of this life new KV is computed with; None until the first update."""
    holding: Holder | None = None
    """Who asks the engine for a pause, while the state does not say yet that it is paused."""

    @property
    def kv_mark(self) -> str | None:
        """The mark of the weights that new KV is computed with.

        A store of KV may outlive the server. The next one can be started with other weights, and
        counts its updates from 1 again, so the mark names the life too, and from the start.
        """
        return ":".join(part for part in (self.kv_life, self.kv_generation) if part) or None


def moved(state: EngineState, name: StateName, **changes: object) -> EngineState:
    """The state under another name, from now on; a pause that led to it is asked for no more."""
    return msgspec.structs.replace(state, state=name, since=time.time(), holding=None, **changes)


def overdue(state: EngineState, now: float) -> bool:
    """Whether the engine stands still for a pause whose time is over.

    Args:
        state: of the engine.
        now: seconds of `time.monotonic()`.
    """
    pause = state.pause
    ends_at = None if pause is None else pause.ends_at
    return state.state == "paused" and ends_at is not None and now >= ends_at


def given_up_for_dead(state: EngineState) -> EngineState:
    """The same state, but whoever holds a pause in it does not live: it is stopped."""
    if state.holding is None:
        return state
    no_start = -1  # no process has this start, so none is the holder
    return msgspec.structs.replace(
        state, holding=msgspec.structs.replace(state.holding, started=no_start)
    )


def carrier_stopped(state: EngineState, *, since: float) -> EngineState:
    """The state whose process does not answer any more, until its successor has said more."""
    doing = "a call" if state.update is None else f"the update to version {state.update.version}"
    attempted = state.weights.version if state.update is None else state.update.version
    fence = Fence(
        code="carrier_stopped",
        detail=f"the process that carried {doing} does not answer, and another takes its place",
        remedy="GET /admin/v1/state again; if it stays so, complete a weight update",
        attempted_version=attempted or 0,
    )
    if state.fence is not None and state.fence.for_good:
        fence = state.fence
    return msgspec.structs.replace(
        state,
        state="fenced",
        since=since,
        fence=fence,
        update=None,
        weights=WeightsInstalled(),
    )


def require(state: EngineState, *allowed: StateName, doing: str) -> None:
    """Refuse a move that is illegal in this state.

    Raises:
        ConflictError: the text names the state, the reason of a fence, and the way out.
    """
    refuse_for_good(state, doing=doing)
    if state.state not in allowed:
        raise not_now(state, doing=doing)


def refuse_for_good(state: EngineState, *, doing: str) -> None:
    """Refuse what no wait makes possible.

    Raises:
        ConflictError: only a restart of the engine helps.
    """
    if state.fence is not None and state.fence.for_good:
        raise not_now(state, doing=doing)


def not_now(state: EngineState, *, doing: str) -> ConflictError:
    """The error of a move that this state does not allow."""
    fence = state.fence
    why = "" if fence is None else f" ({fence.code}: {fence.detail})"
    if state.update is not None and state.update.phase == "prepared":
        why = f" (version {state.update.version} is prepared as {state.update.request_id!r})"
        remedy = "POST /admin/v1/weights/commit or /weights/abort with that request_id"
    elif state.state == "asleep" and state.sleep is not None and not state.sleep.released:
        if state.sleep.weights_lost:
            why = " (its memory is mapped again, but the weights were discarded)"
            remedy = "complete a weight update: POST /admin/v1/weights/update"
        else:
            why = " (its memory is mapped again, but it was not resumed)"
            remedy = _WAY_OUT["asleep"]
    else:
        remedy = fence.remedy if fence is not None and fence.for_good else _WAY_OUT[state.state]
    return ConflictError(f"cannot {doing} while {state.state}{why}", remedy=remedy)


def require_weights_mapped(state: EngineState, *, doing: str) -> None:
    """Refuse what needs the weights' memory while that is released.

    Raises:
        ConflictError: it is.
    """
    if state.sleep is not None and "weights" in state.sleep.released:
        raise ConflictError(
            f"cannot {doing} while asleep: the weights' memory is released",
            remedy='POST /admin/v1/wake with tags ["weights"] first',
        )


def refusal(state: EngineState) -> str | None:
    """What a request is told that a fenced engine does not serve; None when it may pass."""
    fence = state.fence
    if fence is None:
        return None
    return f"this engine is fenced and does not serve: {fence.detail}. Way out: {fence.remedy}"
