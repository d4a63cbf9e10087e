"""What nobody else ends, any API process ends: whoever began it has died, or stands still."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from engine_plugins.admin import call_limits, watcher
from engine_plugins.admin.state import Pause, UpdateProgress, moved
from engine_plugins.admin.update_record import UpdateRecords
from tests.support.admin_server import AdminServer
from tests.support.in_memory_model import hf_tensors
from tests.support.problems import problem
from tests.support.signed_in import signed_in
from tests.support.source_ranks import SourceRank, offered_tensors
from tests.support.state_processes import started

pytestmark = pytest.mark.anyio

MakeServer = Callable[..., AdminServer]

CARRIES = """
    async def hold():
        async with shared.operation("update", wait_s=5):
            print("ready", flush=True)
            sys.stdin.readline()
            await asyncio.sleep(600)
    asyncio.run(hold())
"""
"""Another API process of the same server, in the middle of an update."""


PAUSES = """
    from engine_plugins.admin.pausing import _hold
    async def hold():
        async with shared.operation("pause", wait_s=5):
            _hold(shared, "wait")
            print("ready", flush=True)
            await asyncio.sleep(600)
    asyncio.run(hold())
"""
"""Another one, that asks the engine for a pause."""


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not wait for seconds."""
    monkeypatch.setattr(watcher, "LOOK_S", 0.1)
    monkeypatch.setattr(watcher, "SOURCES_S", 0.2)
    monkeypatch.setattr(watcher, "STOPPED_S", 0.2)


@pytest.fixture
def trainer() -> Iterator[SourceRank]:
    with offered_tensors(hf_tensors(seed=1)) as made:
        yield made


async def _prepared(server: AdminServer, trainer: SourceRank, timeout_s: float) -> None:
    plan = await server.plan(trainer.manifest)
    body = {"plan_id": plan, "version": 7, "request_id": "p", "timeout_s": timeout_s}
    prepared = await server.post("/weights/prepare", **body)
    assert prepared.status_code == 200, prepared.text


async def test_a_pause_is_ended_though_its_process_died(make_server: MakeServer) -> None:
    """The time that its holder said is on the page."""
    server = make_server()
    async with server.running():
        await server.engine.pause("keep")
        ends_at = time.monotonic() + 0.3
        pause = Pause(mode="keep", until=time.time() + 0.3, ends_at=ends_at)
        server.shared.change(lambda state: moved(state, "paused", pause=pause))
        await server.until("serving")
        assert time.monotonic() >= ends_at
        assert not server.engine.paused


async def test_a_process_that_is_stopped_in_another_call_holds_nobody_up(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here in a pause that it had asked the engine for and not yet told of."""
    monkeypatch.setattr(call_limits, "STOPPED_S", 0.3)
    server = make_server()
    async with server.running():
        await server.engine.pause("keep")
        with started(PAUSES, server.shared.runtime_dir) as other:
            os.kill(other.pid, signal.SIGSTOP)
            flushed = await server.post("/flush")
            assert flushed.status_code == 200, flushed.text
            for _ in range(100):
                if not server.engine.paused:
                    break
                await asyncio.sleep(0.05)
            state = await server.state()
            assert (state["state"], server.engine.paused) == ("serving", False)
            assert server.shared.read().holding is None


async def test_an_update_whose_process_died_is_given_up(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Without anybody asking for anything; nothing was touched, so the old weights serve."""
    server = make_server()
    async with server.running():
        await _prepared(server, trainer, timeout_s=60)
        with started(CARRIES, server.shared.runtime_dir) as carrier:
            _as_if_carried(server, touched=False)
            await asyncio.sleep(0.3)
            assert server.shared.read().state == "updating"
            carrier.kill()
            carrier.wait()
            await server.until("serving")
        assert server.engine.calls[-1] in ("abort", "resume")


async def test_a_stopped_process_is_replaced_and_named(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Once its update is overdue. What it asks of the ranks when it wakes up is refused."""
    server = make_server()
    async with server.running():
        await _prepared(server, trainer, timeout_s=60)
        before = server.shared.generation
        with started(CARRIES, server.shared.runtime_dir) as carrier:
            _as_if_carried(server, touched=True, deadline=time.monotonic() + 0.5)
            os.kill(carrier.pid, signal.SIGSTOP)
            await server.until("fenced")
            state = await server.state()
            assert f"(pid {carrier.pid}) is stopped" in state["fence"]["detail"]
            assert "version 7" in state["fence"]["detail"]
            assert server.shared.generation == before + 1
            plan = await server.plan(trainer.manifest)
            done = await server.post("/weights/update", plan_id=plan, version=8)
            assert done.status_code == 200, done.text
            assert (await server.state())["state"] == "serving"


async def test_a_process_that_runs_carries_its_update_on(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """However near its deadline is."""
    server = make_server()
    async with server.running():
        await _prepared(server, trainer, timeout_s=60)
        with started(CARRIES, server.shared.runtime_dir):
            _as_if_carried(server, touched=True, deadline=time.monotonic() - 1)
            await asyncio.sleep(1)
            assert server.shared.read().state == "updating"


async def test_an_update_of_which_nothing_is_known_is_a_fence(make_server: MakeServer) -> None:
    """A record that is gone says nothing of the weights."""
    server = make_server()
    async with server.running():
        held = server.engine.submit(1, 2, 3)
        progress = UpdateProgress(
            request_id="r", version=7, phase="install", bytes_done=1, bytes_total=2
        )
        server.shared.change(lambda state: moved(state, "updating", update=progress))
        await server.until("fenced")
        await asyncio.wait_for(held.ended.wait(), 5)
        fence = (await server.state())["fence"]
        assert "version 7" in fence["detail"]


async def test_a_prepared_update_ends_with_its_trainer(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Others need not wait until its commit is overdue; who is gone is named."""
    server = make_server()
    async with server.running():
        await _prepared(server, trainer, timeout_s=60)
        await asyncio.sleep(0.6)
        assert server.shared.read().state == "updating", "its trainer is there"
        trainer.transport.close()
        await server.until("serving")
        commit = await server.post("/weights/commit", request_id="p")
        assert trainer.transport.agent in problem(commit, 503, "peer_lost")


@pytest.mark.parametrize("paused", [False, True])
async def test_an_engine_of_which_a_process_is_stopped_refuses_until_it_goes_on(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch, paused: bool
) -> None:
    """No call need be under way; afterwards it is as before, with its version."""
    monkeypatch.setattr(call_limits, "STOPPED_S", 0.5)
    server = make_server()
    with signed_in(server.shared.runtime_dir, "worker", 1) as process:
        async with server.running():
            if paused:
                await server.post("/pause")
            before = server.shared.read()
            await asyncio.sleep(0.8)
            assert server.shared.read() == before
            process.send_signal(signal.SIGSTOP)
            await server.until("fenced")
            fence = (await server.state())["fence"]
            assert fence["code"] == "process_stopped"
            assert f"worker rank 1 (pid {process.pid}) is stopped" in fence["detail"]
            process.send_signal(signal.SIGCONT)
            await server.until(before.state)
            after = server.shared.read()
            assert (after.fence, after.pause, after.weights) == (None, before.pause, before.weights)


def _as_if_carried(server: AdminServer, *, touched: bool, deadline: float | None = None) -> None:
    """A prepared update that another process has begun to commit."""
    records = UpdateRecords(server.shared)
    record = records.read()
    assert record is not None
    record.prepared = None
    record.touched = touched
    record.deadline = deadline or record.deadline
    records.keep(record)
    progress = server.shared.read().update
    assert progress is not None
    installing = msgspec.structs.replace(progress, phase="install")
    server.shared.change(lambda state: msgspec.structs.replace(state, update=installing))
