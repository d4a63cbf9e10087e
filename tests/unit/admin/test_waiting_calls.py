"""Calls that meet another: whoever can be served after it waits, and is told for how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from engine_plugins.admin.state import Fence, Sleep, moved
from tests.support.admin_server import AdminServer
from tests.support.in_memory_model import hf_tensors
from tests.support.source_ranks import SourceRank, offered_tensors

pytestmark = pytest.mark.anyio

MakeServer = Callable[..., AdminServer]


@pytest.fixture
def trainer() -> Iterator[SourceRank]:
    with offered_tensors(hf_tensors(seed=1)) as made:
        yield made


@asynccontextmanager
async def two_processes(
    make_server: MakeServer,
) -> AsyncIterator[tuple[AdminServer, AdminServer]]:
    first = make_server()
    second = make_server(engine=first.engine)
    async with first.running(), second.http:
        yield first, second


@asynccontextmanager
async def held(server: AdminServer, name: str, seconds: float) -> AsyncIterator[None]:
    """Another call of this name, under way for so long."""
    ready = asyncio.Event()

    async def hold() -> None:
        async with server.shared.operation(name):
            ready.set()
            await asyncio.sleep(seconds)

    task = asyncio.create_task(hold())
    await ready.wait()
    yield
    await task


async def test_an_update_waits_for_another_call_and_says_how_long(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Of its own process or another; every step of an update does."""
    async with two_processes(make_server) as (server, other):
        async with held(other, "flush", 0.3):
            plan_id = await server.plan(trainer.manifest)
        for version, each in enumerate((server, other), 1):
            asked = {"plan_id": plan_id, "version": version}
            async with held(server, "flush", 0.4):
                answer = await each.post("/weights/update", **asked)
            assert answer.status_code == 200, answer.text
            report = answer.json()
            assert 0.2 < report["phases"]["wait_s"] < report["seconds"]
        for version, end in ((3, "abort"), (4, "commit")):
            asked = {"plan_id": plan_id, "version": version, "request_id": end}
            async with held(other, "flush", 0.4):
                prepared = await server.post("/weights/prepare", **asked)
            assert prepared.status_code == 200, prepared.text
            waited = prepared.json()["phases"]["wait_s"]
            assert waited > 0.2
            async with held(other, "flush", 0.4):
                ended = await server.post(f"/weights/{end}", request_id=end)
            assert ended.status_code == 200, ended.text
            if end == "commit":
                assert ended.json()["phases"]["wait_s"] > waited + 0.2, "both waits"
        assert server.engine.serves(seed=1)
        free = await server.post("/weights/update", plan_id=plan_id, version=5)
        assert free.json()["phases"]["wait_s"] < 0.1


async def test_calls_of_operators_beside_updates_fail_none(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Pauses, flushes and resumes of other teams, all the time, on both processes."""
    async with two_processes(make_server) as (server, other):
        plan_id = await server.plan(trainer.manifest)
        done = asyncio.Event()
        told = list[int]()

        async def storm(each: AdminServer) -> None:
            while not done.is_set():
                for path in ("/pause", "/flush", "/resume"):
                    told.append((await each.post(path)).status_code)

        storms = [asyncio.create_task(storm(each)) for each in (server, other, server, other)]
        await asyncio.sleep(0.1)
        answers = [
            await server.post("/weights/update", plan_id=plan_id, version=version)
            for version in range(1, 11)
        ]
        done.set()
        await asyncio.gather(*storms)
        assert [answer.status_code for answer in answers] == [200] * 10
        assert set(told) <= {200, 409}
        await server.post("/resume")
        assert server.engine.serves(seed=1)


async def test_two_trainers_take_turns(make_server: MakeServer, trainer: SourceRank) -> None:
    """Both connect and update at the same time, through different processes."""
    async with two_processes(make_server) as (server, other):
        plans = await asyncio.gather(server.plan(trainer.manifest), other.plan(trainer.manifest))
        trainer.transport.bytes_per_s = 1e5
        answers = await asyncio.gather(
            *(
                each.post("/weights/update", plan_id=plan_id, version=version, force=True)
                for version, (each, plan_id) in enumerate(zip((server, other), plans, strict=True))
            )
        )
        assert [answer.status_code for answer in answers] == [200, 200]
        assert max(answer.json()["phases"]["wait_s"] for answer in answers) > 0.05


@pytest.mark.parametrize("why", ["for good", "asleep"])
async def test_what_no_wait_makes_possible_is_refused_at_once(
    make_server: MakeServer, trainer: SourceRank, why: str
) -> None:
    """A fence that only a restart lifts; released weights, while nobody wakes the engine."""
    async with two_processes(make_server) as (server, other):
        plan_id = await server.plan(trainer.manifest)
        fence = Fence(code="c", detail="d", remedy="restart", attempted_version=1, for_good=True)
        sleep = Sleep(level=1, released=["weights"], since=0.0, resume=True)
        server.shared.change(
            lambda state: (
                moved(state, "fenced", fence=fence)
                if why == "for good"
                else moved(state, "asleep", sleep=sleep)
            )
        )
        async with held(other, "flush", 1.0):
            began = time.monotonic()
            for path, body in (
                ("update", {"plan_id": plan_id, "version": 1}),
                ("connect", {"source_ids": ["source-1"]}),
            ):
                refused = await server.post(f"/weights/{path}", **body)
                assert (refused.status_code, refused.json()["code"]) == (409, "illegal_state")
            assert time.monotonic() - began < 0.5


async def test_a_wait_ends_with_the_update_s_own_time(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """The trainer is told in time, and of what it waited for."""
    async with two_processes(make_server) as (server, other):
        plan_id = await server.plan(trainer.manifest)
        async with held(other, "pause", 1.5):
            began = time.monotonic()
            refused = await server.post(
                "/weights/update", plan_id=plan_id, version=1, timeout_s=0.4
            )
            assert 0.3 < time.monotonic() - began < 1
            assert refused.status_code == 409
            assert "pause (process" in refused.json()["detail"]
            assert "also after a wait of 0.4 s" in refused.json()["detail"]
