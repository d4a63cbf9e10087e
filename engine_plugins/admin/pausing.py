"""Pausing with a deadline of ours: engines have none."""

from __future__ import annotations

import asyncio

from engine_plugins.admin.engine_control import EngineControl, PauseMode
from engine_plugins.errors import PauseTimeoutError

__all__ = ["pause_within"]

_late: set[asyncio.Task[None]] = set()
"""Pauses that were given up but that the engine will still answer."""


async def pause_within(control: EngineControl, mode: PauseMode, timeout_s: float) -> None:
    """Pause, or put the engine back to serving.

    The engine's own call is not cancelled: its late answer would be taken for another's.

    Raises:
        PauseTimeoutError: generation did not stand still within `timeout_s`.
    """
    task = asyncio.create_task(control.pause(mode))
    done, _ = await asyncio.wait({task}, timeout=timeout_s)
    if done:
        await task
        return
    _late.add(task)
    task.add_done_callback(_forget)
    await control.resume()
    raise PauseTimeoutError(
        f"pause({mode}) did not complete within {timeout_s:g} s; the engine serves as before",
        remedy="wait longer, or pause with mode keep or abort",
    )


def _forget(task: asyncio.Task[None]) -> None:
    _late.discard(task)
    if not task.cancelled():
        task.exception()
