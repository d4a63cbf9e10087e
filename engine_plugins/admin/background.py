"""Work that goes on although nobody waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from engine_plugins.errors import EnginePluginError

__all__ = ["Background", "going_on"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Background:
    """Tasks that are held until they end; the event loop itself holds them only weakly."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start work that ends by itself. Its error goes to the log, and to whoever awaits it."""
        task = self._start(work)
        task.add_done_callback(_log_error)
        return task

    async def to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Await work that a caller who hangs up must not stop half way."""
        task = self._start(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_log_error)  # its caller is gone
            raise

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


@asynccontextmanager
async def going_on(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Have work without an end go on for as long as a context lasts."""
    task = asyncio.create_task(work)
    task.add_done_callback(_log_error)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def _log_error(task: asyncio.Task[Any]) -> None:
    if task.cancelled():
        return
    error, what = task.exception(), task.get_coro()
    if isinstance(error, EnginePluginError):
        logger.warning("%s: %s", getattr(what, "__qualname__", what), error)
    elif error is not None:
        logger.error("%s failed", getattr(what, "__qualname__", what), exc_info=error)
