"""A pause that was given up leaves the engine as the page says, whoever dies or hangs up."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial

import msgspec
import pytest

from engine_plugins.admin import pausing
from engine_plugins.admin.engine_control import PauseMode
from engine_plugins.admin.pausing import end_left_pause, end_overdue, new_pause, pause_within
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import EngineState, Holder, StateName, moved, overdue
from engine_plugins.errors import EngineCallError, PauseTimeoutError
from tests.support.admin_server import AdminServer
from tests.support.in_memory_engine import InMemoryEngine

pytestmark = pytest.mark.anyio


class SlowEngine(InMemoryEngine):
    """Takes its time to pause, whatever was asked of it meanwhile, and to resume."""

    pause_s = 0.2
    resume_s = 0.0

    async def pause(self, mode: PauseMode) -> None:
        await asyncio.sleep(self.pause_s)
        await super().pause(mode)

    async def resume(self) -> None:
        await asyncio.sleep(self.resume_s)
        await super().resume()


@pytest.fixture
def engine() -> Iterable[SlowEngine]:
    made = SlowEngine()
    yield made
    made.close()


async def test_whoever_pauses_holds_new_requests_until_it_is_given_up(
    engine: SlowEngine, shared: SharedState
) -> None:
    """Only a pause that lets requests end needs new ones held at the door."""
    modes: tuple[PauseMode, ...] = ("wait", "abort", "keep")
    for mode in modes:
        asked = asyncio.create_task(pause_within(engine, shared, mode, 0.1))
        await asyncio.sleep(0.05)
        holder = shared.read().holding
        assert holder is not None
        assert (holder.drains, holder.pid, holder.lives) == (mode != "keep", os.getpid(), True)
        with pytest.raises(PauseTimeoutError, match=r"0\.1 s; the engine serves as before"):
            await asked
        assert shared.read().holding is None


async def test_a_late_end_of_one_pause_leaves_the_next_ones_hold(
    engine: SlowEngine, shared: SharedState
) -> None:
    """The first is given up, and its resume comes back only while the second drains."""
    engine.resume_s = 0.3
    pausing_first = pause_within(engine, shared, "wait", 0.05)
    first = asyncio.create_task(pausing_first)
    await asyncio.sleep(0.1)  # given up, and being resumed
    engine.pause_s = 1.0
    second = asyncio.create_task(pause_within(engine, shared, "wait", 10))
    with pytest.raises(PauseTimeoutError):
        await first
    holder = shared.read().holding
    assert holder is not None
    assert holder.drains
    await second
    holder = shared.read().holding
    assert holder is not None, "until the state says that it is paused"
    assert not holder.drains
    assert shared.change(lambda now: moved(now, "paused")).holding is None


async def test_an_engine_that_does_not_resume_is_not_waited_for(
    engine: SlowEngine, shared: SharedState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer comes in time, and says so."""
    monkeypatch.setattr(pausing, "RESUME_S", 0.1)
    engine.resume_s = 0.4
    asked = time.monotonic()
    with pytest.raises(PauseTimeoutError, match=r"has not said within 0\.1 s that it serves"):
        await pause_within(engine, shared, "wait", 0.05)
    assert time.monotonic() - asked < 0.35
    await asyncio.sleep(0.4)
    assert (engine.paused, shared.read().holding) == (False, None)


async def test_an_engine_that_failed_to_pause_is_resumed(
    engine: SlowEngine, shared: SharedState
) -> None:
    """Some of its ranks may stand still; if that fails as well, the error says what to do."""
    engine.fail_once = {"pause keep"}
    with pytest.raises(EngineCallError, match="pause keep"):
        await pause_within(engine, shared, "keep", 5)
    assert engine.calls[-1] == "resume"
    engine.fail_once = {"pause keep", "resume"}
    with pytest.raises(EngineCallError, match="resuming it failed") as error:
        await pause_within(engine, shared, "keep", 5)
    assert "/resume" in error.value.remedy
    assert shared.read().holding is None


async def test_a_caller_that_is_cancelled_leaves_an_engine_that_serves(
    engine: SlowEngine, shared: SharedState
) -> None:
    """Also where the engine pauses only after that."""
    asked = asyncio.create_task(pause_within(engine, shared, "wait", 5))
    await asyncio.sleep(0.05)
    asked.cancel()
    await asyncio.wait({asked})
    await asyncio.sleep(0.05)
    assert (engine.calls, shared.read().holding) == (["resume"], None)


async def test_a_process_that_dies_while_it_pauses_leaves_nothing(
    make_server: Callable[..., AdminServer],
) -> None:
    """The engine stands still, and the state says that it serves: the next call puts it right."""
    server = make_server()
    died = os.fork()
    if died == 0:
        pausing._hold(SharedState(server.shared.runtime_dir), "wait")
        signal.pause()
    async with server.running():
        await _until(server.shared, lambda state: state.holding is not None)
        await server.engine.pause("wait")
        assert not await end_left_pause(server.engine, server.shared), "it lives"
        os.kill(died, signal.SIGKILL)
        await asyncio.to_thread(os.waitpid, died, 0)
        assert (await server.post("/flush")).status_code == 200
        assert (server.engine.paused, server.shared.read().holding) == (False, None)


async def test_a_fenced_engine_is_not_resumed_for_a_dead_process(
    engine: SlowEngine, shared: SharedState
) -> None:
    """Only an engine that counts as serving is."""
    dead = Holder(pid=1 << 22, started=1, serial="gone", drains=True)
    states: tuple[StateName, ...] = ("fenced", "updating", "paused", "asleep", "serving")
    for name in states:
        shared.change(partial(_in_state, name=name, holding=dead))
        assert await end_left_pause(engine, shared)
        assert shared.read().holding is None
        assert engine.calls == (["resume"] if name == "serving" else [])


async def test_a_pause_is_over_by_the_clock_that_nobody_sets_back(
    engine: SlowEngine, shared: SharedState
) -> None:
    """`until` is for people; an engine that sleeps or updates keeps its pause."""
    pause = new_pause("keep", 30)
    assert pause.ends_at is not None
    shared.change(lambda now: moved(now, "paused", pause=pause))
    assert not await end_overdue(engine, shared)
    over = type(pause)(mode="keep", until=pause.until, ends_at=time.monotonic())
    states: tuple[StateName, ...] = ("asleep", "updating", "fenced")
    for name in states:
        shared.change(partial(_in_state, name=name, pause=over))
        assert not await end_overdue(engine, shared)
    shared.change(lambda now: moved(now, "paused"))
    assert overdue(shared.read(), time.monotonic())
    assert await end_overdue(engine, shared)
    state = shared.read()
    assert (state.state, state.pause, engine.calls) == ("serving", None, ["resume"])


def _in_state(state: EngineState, *, name: StateName, **changes: object) -> EngineState:
    return msgspec.structs.replace(moved(state, name), **changes)


async def _until(shared: SharedState, reached: Callable[[EngineState], bool]) -> None:
    give_up = time.monotonic() + 10
    while not reached(shared.read()):
        assert time.monotonic() < give_up
        await asyncio.sleep(0.01)
