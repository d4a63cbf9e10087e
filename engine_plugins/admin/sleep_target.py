"""What a sleep or a wake still has to do, so that a repeat of either finds it done.

A client whose answer was lost sends the same call again. The engine keeps no list of calls: a call
names a target, and whoever finds it reached is answered with the state.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from engine_plugins.admin.schemas import SleepBody, WakeBody
from engine_plugins.admin.state import (
    EngineState,
    Fence,
    Sleep,
    WeightsInstalled,
    moved,
    require,
)
from engine_plugins.errors import ConflictError, EnginePluginError
from engine_plugins.sleep.memory_backend import MEMORY_TAGS, MemoryTag
from engine_plugins.sleep.memory_report import ResidualReport
from engine_plugins.sleep.rank_sleep import Room

__all__ = [
    "asleep",
    "awake_without_weights",
    "judged",
    "left_to_map",
    "left_to_release",
    "mapped",
    "require_room",
    "require_same_level",
    "unknown_memory",
    "without_weights",
]

GIB = 1 << 30


def require_same_level(state: EngineState, body: SleepBody) -> None:
    """Refuse a sleep whose level the weights of this engine cannot have any more.

    Raises:
        ConflictError: the weights were discarded and are to be kept, or the other way round.
    """
    sleep = state.sleep
    if sleep is None or (body.tags is not None and "weights" not in body.tags):
        return
    if sleep.weights_lost and body.level == 1:
        raise ConflictError(
            "cannot sleep with level 1: the weights were discarded already",
            remedy="sleep with level 2, or complete a weight update first",
        )
    if "weights" in sleep.released and not sleep.weights_lost and body.level == 2:
        raise ConflictError(
            "cannot discard the weights: they are released already, and kept (level 1)",
            remedy="POST /admin/v1/wake, then sleep with level 2",
        )


def left_to_release(ranks: Sequence[Sequence[MemoryTag]]) -> list[MemoryTag]:
    """What any rank has still to release: after a call that died half way they differ."""
    return [tag for tag in MEMORY_TAGS if any(tag in rank for rank in ranks)]


def left_to_map(state: EngineState, body: WakeBody) -> list[MemoryTag] | None:
    """What a wake has still to map; None if the engine is awake.

    Raises:
        ConflictError: the engine is fenced or updating.
    """
    if state.sleep is None:
        require(state, "serving", "paused", doing="wake")
        return None
    require(state, "asleep", doing="wake")
    return [tag for tag in state.sleep.released if body.tags is None or tag in body.tags]


def require_room(rooms: Sequence[Room]) -> None:
    """Refuse a wake that would end half mapped.

    Raises:
        ConflictError: a device has less free than its ranks are about to map.
    """
    for device in {room.device for room in rooms}:
        ranks = [room for room in rooms if room.device == device]
        needed, free = sum(each.needed_bytes for each in ranks), min(r.free_bytes for r in ranks)
        if needed > free:
            raise ConflictError(
                f"cannot wake: {needed / GIB:.3g} GiB are to be mapped on {device}, where "
                f"{free / GIB:.3g} GiB are free",
                remedy="have whoever holds that memory give it back, then wake; or wake by tags",
            )


def asleep(state: EngineState, level: int, tags: Sequence[MemoryTag]) -> EngineState:
    """The state from the moment on at which tags may be out of memory."""
    before = state.sleep
    lost = level == 2 and "weights" in tags
    released = {*tags, *(before.released if before is not None else ())}
    sleep = Sleep(
        level=max(level, before.level if before is not None else level),
        released=[tag for tag in MEMORY_TAGS if tag in released],
        since=time.time(),
        resume=state.state == "serving" if before is None else before.resume,
        weights_lost=lost or (before is not None and before.weights_lost),
    )
    weights = WeightsInstalled() if lost else state.weights
    return moved(state, "asleep", sleep=sleep, weights=weights)


def judged(state: EngineState, report: ResidualReport) -> EngineState:
    """The state of a sleeping engine whose memory was measured."""
    sleep = state.sleep
    if sleep is None:
        return state
    sleep = msgspec.structs.replace(sleep, verdict=report.verdict, reason=report.reason or None)
    return msgspec.structs.replace(state, sleep=sleep)


def unknown_memory(code: str, error: EnginePluginError) -> Fence:
    """A fence for good: nobody knows what a rank's memory holds."""
    return Fence(
        code=code,
        detail=f"a rank's memory is in an unknown state: {error.message}",
        remedy="restart the engine",
        attempted_version=0,
        for_good=True,
    )


def without_weights(error: EnginePluginError) -> Fence:
    """All memory is mapped and known, so weights of any version lift this fence."""
    return Fence(
        code="sleep_failed",
        detail=f"weights were discarded for a sleep that then failed: {error.message}",
        remedy="complete a weight update: POST /admin/v1/weights/update",
        attempted_version=0,
    )


def awake_without_weights(state: EngineState, before: Sleep | None) -> EngineState:
    """The sleep of before, if there was one, with weights that hold nothing of use."""
    sleep = None if before is None else msgspec.structs.replace(before, weights_lost=True)
    return msgspec.structs.replace(state, sleep=sleep)


def mapped(
    state: EngineState, tags: Sequence[MemoryTag], *, weights: WeightsInstalled | None = None
) -> EngineState:
    """The state with these tags in memory again; with `weights` nothing of them was lost."""
    sleep = state.sleep
    if sleep is None:
        return state
    sleep = msgspec.structs.replace(
        sleep,
        released=[tag for tag in sleep.released if tag not in tags],
        weights_lost=sleep.weights_lost and weights is None,
    )
    return msgspec.structs.replace(state, sleep=sleep, weights=weights or state.weights)
