"""Pausing with a deadline of ours: engines have none. And the ends of pauses that nobody ends.

What the engine does and what the state says change one after the other, so a process that dies
between the two would leave an engine that stands still and counts as serving. Whoever pauses
therefore says so in the state first (`Holder`).
"""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import msgspec

from engine_plugins.admin.engine_control import EngineControl, PauseMode
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import EngineState, Holder, Pause, moved, overdue
from engine_plugins.errors import EnginePluginError, PauseTimeoutError
from engine_plugins.sleep.process_identity import start_ticks

__all__ = ["end_left_pause", "end_overdue", "new_pause", "pause_within"]

RESUME_S = 4.0
"""How long an engine whose pause was given up may take to say that it serves."""

_late: set[asyncio.Task[None]] = set()
"""Calls that were given up but that the engine will still answer."""


def new_pause(mode: PauseMode, hold_s: float | None) -> Pause:
    """A pause that a caller asks for now."""
    if hold_s is None:
        return Pause(mode=mode, until=None)
    return Pause(mode=mode, until=time.time() + hold_s, ends_at=time.monotonic() + hold_s)


async def pause_within(
    control: EngineControl, shared: SharedState, mode: PauseMode, timeout_s: float
) -> None:
    """Pause, or put the engine back to serving; the caller holds the operation lock.

    The engine's own call is not cancelled: its late answer would be taken for another's. Once this
    has returned, the caller's move to another state ends the hold.

    Raises:
        PauseTimeoutError: generation did not stand still within `timeout_s`.
        EnginePluginError: the engine would not pause.
    """
    holder = _hold(shared, mode)
    task = _kept(control.pause(mode))
    try:
        await asyncio.wait({task}, timeout=timeout_s)
    except asyncio.CancelledError:
        # Nobody is left who would resume the engine once it stands still.
        _kept(_resume(control, shared, holder))
        raise
    error = _error_of(task, mode, timeout_s)
    if error is None:
        _change(shared, holder, msgspec.structs.replace(holder, drains=False))
        return
    resuming = _kept(_resume(control, shared, holder))
    await asyncio.wait({resuming}, timeout=RESUME_S)
    if not resuming.done():
        error.message += f"; it has not said within {RESUME_S:g} s that it serves again"
    elif (failed := resuming.exception()) is not None:
        error.message += f"; resuming it failed: {failed}"
        error.remedy = "POST /admin/v1/resume"
    raise error


async def end_overdue(control: EngineControl, shared: SharedState) -> bool:
    """Serve again if the time of the pause is over; the caller holds the operation lock."""
    if not overdue(shared.read(), time.monotonic()):
        return False
    await control.resume()
    shared.change(lambda now: moved(now, "serving", pause=None))
    return True


async def end_left_pause(control: EngineControl, shared: SharedState) -> bool:
    """Serve again if a process has died while it asked for a pause, which is then nobody's.

    The caller holds the operation lock.
    """
    state = shared.read()
    holder = state.holding
    if holder is None or holder.lives:
        return False
    if state.state == "serving":
        await control.resume()
    _change(shared, holder, None)
    return True


def _hold(shared: SharedState, mode: PauseMode) -> Holder:
    holder = Holder(
        pid=os.getpid(),
        started=_started(os.getpid()),
        serial=secrets.token_hex(4),
        drains=mode != "keep",
    )
    shared.change(lambda state: msgspec.structs.replace(state, holding=holder))
    return holder


def _started(pid: int) -> int | None:
    with suppress(OSError):  # no descriptor left, and never asked before: unknown
        return _start_ticks(pid)
    return None


_start_ticks = functools.cache(start_ticks)


def _change(shared: SharedState, holder: Holder, to: Holder | None) -> None:
    """Change a hold, unless it is another pause's by now."""

    def change(state: EngineState) -> EngineState:
        now = state.holding
        ours = now is not None and now.serial == holder.serial
        return msgspec.structs.replace(state, holding=to) if ours else state

    shared.change(change)


def _error_of(
    task: asyncio.Task[None], mode: PauseMode, timeout_s: float
) -> EnginePluginError | None:
    if not task.done():
        return PauseTimeoutError(
            f"pause({mode}) did not complete within {timeout_s:g} s; the engine serves as before",
            remedy="wait longer, or pause with mode keep or abort",
        )
    error = task.exception()
    if error is None or isinstance(error, EnginePluginError):
        return error
    return EnginePluginError(f"{type(error).__name__}: {error}")


async def _resume(control: EngineControl, shared: SharedState, holder: Holder) -> None:
    try:
        await control.resume()
    finally:
        _change(shared, holder, None)


def _kept(call: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A call that goes on although nobody may wait for its end."""
    task = asyncio.create_task(call)
    _late.add(task)
    task.add_done_callback(_forget)
    return task


def _forget(task: asyncio.Task[None]) -> None:
    _late.discard(task)
    if not task.cancelled():
        task.exception()
