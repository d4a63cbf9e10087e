"""Every call to an engine ends, whatever becomes of the engine; late answers are nobody's."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from pathlib import Path

import pytest

from engine_plugins.admin import bounded_control, call_limits
from engine_plugins.admin.bounded_control import BoundedControl, bounded
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.errors import EngineCallError, EngineDeadError, EngineStuckError
from engine_plugins.shared_page import SharedPage
from engine_plugins.weights.receiving.worker_messages import encode_call
from engine_plugins.weights.receiving.worker_service import BUSY_SINCE, pull_page
from tests.support.in_memory_engine import InMemoryEngine
from tests.support.signed_in import signed_in
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture
def engine() -> InMemoryEngine:
    return InMemoryEngine()


@pytest.fixture
def control(engine: InMemoryEngine, shared: SharedState) -> BoundedControl:
    return bounded(engine, shared)


async def test_a_late_answer_is_taken_for_no_other(
    engine: InMemoryEngine, control: BoundedControl, caplog: pytest.LogCaptureFixture
) -> None:
    """The call goes on in the engine; the one after it gets its own answer."""
    engine.freeze_at = "describe"
    asked = time.monotonic()
    with pytest.raises(EngineStuckError, match=r"did not answer describe within 0\.6 s"):
        await control.until(lambda: asked + 0.6).call_workers("describe", encode_call())
    assert 0.5 < time.monotonic() - asked < 3
    assert control.health.is_behind
    counting = asyncio.create_task(control.request_counts())
    with caplog.at_level(logging.WARNING):
        engine.go_on()
        assert (await counting).running == 0
        await asyncio.sleep(0.05)
    assert "describe was answered after" in caplog.text
    assert not control.health.is_behind
    engine.close()


async def test_who_is_stopped_is_named(
    engine: InMemoryEngine, control: BoundedControl, runtime_dir: Path
) -> None:
    """Role, rank and pid; otherwise it is said that nobody is."""
    with signed_in(runtime_dir, "worker", 0), signed_in(runtime_dir, "worker", 1) as process:
        engine.freeze_at = "resume"
        with pytest.raises(EngineStuckError, match=r"none of its processes is stopped.*rank 1"):
            await control.until(time.monotonic).resume()
        process.send_signal(signal.SIGSTOP)
        until(
            lambda: bool(control.health.processes.still()), otherwise=control.health.processes.named
        )
        with pytest.raises(EngineStuckError, match=rf"rank 1 \(pid {process.pid}\) is stopped"):
            await control.until(time.monotonic).resume()


async def test_ranks_that_have_not_come_out_of_a_call_are_named(
    engine: InMemoryEngine, control: BoundedControl, runtime_dir: Path
) -> None:
    """Where nobody is stopped: one of them waits for the others, or for a device."""
    for rank in range(3):
        SharedPage.create(pull_page(runtime_dir, rank), nbytes=4096)
    page = SharedPage(pull_page(runtime_dir, 1))
    page.gauges[BUSY_SINCE] = int((time.monotonic() - 7) * 1e6)
    engine.freeze_at = "resume"
    with pytest.raises(EngineStuckError, match=r"still in a call: rank 1 for 7\.\d s \["):
        await control.until(time.monotonic).resume()


async def test_a_stopped_process_is_not_waited_for_to_a_calls_own_limit(
    engine: InMemoryEngine,
    control: BoundedControl,
    runtime_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A plan may take minutes, but not of a process that does not run."""
    monkeypatch.setattr(bounded_control, "STOPPED_S", 0.8)
    with signed_in(runtime_dir, "scheduler", 0) as process:
        process.send_signal(signal.SIGSTOP)
        engine.freeze_at = "connect"
        assert call_limits.limit_of("connect") > 60
        asked = time.monotonic()
        with pytest.raises(EngineStuckError, match="scheduler rank 0"):
            await control.call_workers("connect", encode_call())
        assert time.monotonic() - asked < 5


async def test_a_dead_process_ends_the_calls_that_are_open(
    engine: InMemoryEngine, control: BoundedControl, runtime_dir: Path
) -> None:
    """Nobody would answer them. One that the engine answers with an error says why, too."""
    with signed_in(runtime_dir, "worker", 1) as process:
        engine.freeze_at = "finish"
        call = asyncio.create_task(control.call_workers("finish", encode_call()))
        await asyncio.sleep(0.1)
        process.kill()
        killed = time.monotonic()
        with pytest.raises(EngineDeadError, match=rf"rank 1 \(pid {process.pid}\) has ended"):
            await call
        assert time.monotonic() - killed < 2
        engine.go_on()
        engine.fail_once.add("resume")
        with pytest.raises(EngineDeadError, match="rank 1"):
            await control.resume()


async def test_errors_of_a_living_engine_are_its_own(
    engine: InMemoryEngine, control: BoundedControl
) -> None:
    """Passed on as they are."""
    engine.fail_once.add("resume")
    with pytest.raises(EngineCallError, match="did not answer: resume") as told:
        await control.resume()
    assert not isinstance(told.value, EngineDeadError)
    engine.close()


async def test_a_caller_that_hangs_up_does_not_cancel_the_engines_call(
    engine: InMemoryEngine, control: BoundedControl
) -> None:
    """Its answer would be left for the next."""
    engine.freeze_at = "publish_version"
    caller = asyncio.create_task(control.publish_version(7))
    await asyncio.sleep(0.05)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    engine.go_on()
    await asyncio.sleep(0.05)
    assert engine.versions == [7]
    engine.close()


def test_an_engine_is_bounded_once(control: BoundedControl, shared: SharedState) -> None:
    """Every part of a process shares what is known of it."""
    assert bounded(control, shared) is control
    assert control.until(lambda: 0.0).health is control.health
