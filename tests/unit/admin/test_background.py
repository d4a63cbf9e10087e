"""Work that outlives whoever asked for it."""

from __future__ import annotations

import asyncio
import gc

import pytest

from engine_plugins.admin.background import Background

pytestmark = pytest.mark.anyio


async def test_work_goes_on_when_its_caller_is_gone() -> None:
    """A client that hangs up cancels the wait, not the work."""
    background, done = Background(), asyncio.Event()

    async def work() -> int:
        await asyncio.sleep(0.01)
        done.set()
        return 7

    caller = asyncio.create_task(background.to_the_end(work()))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    gc.collect()
    await asyncio.wait_for(done.wait(), 10)
    assert await background.to_the_end(work()) == 7


async def test_an_error_is_its_callers_and_nobody_elses() -> None:
    """Raised to whoever waits; without a caller asyncio has nothing to complain about."""
    background = Background()
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, said: complaints.append(said))

    async def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await background.to_the_end(fail())
    task = background.keep(fail())
    await asyncio.wait({task})
    del task
    await asyncio.sleep(0)
    gc.collect()
    assert complaints == []
