"""Updates in two phases: prepared, the old weights serve; committed, the new ones; once each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import msgspec
import pytest

from engine_plugins.admin.state import Fence, moved
from engine_plugins.admin.update_record import UpdateRecords
from engine_plugins.errors import TransportError
from engine_plugins.weights.receiving.worker_messages import AbortAnswer
from engine_plugins.weights.transport import transfers
from tests.support.admin_server import AdminServer
from tests.support.in_memory_model import hf_tensors
from tests.support.source_ranks import SourceRank, offered_tensors

pytestmark = pytest.mark.anyio

MakeServer = Callable[..., AdminServer]
SLOW = 2e4
"""Bytes per second at which the pull of the test's model lasts half a second."""


@pytest.fixture
def trainer() -> Iterator[SourceRank]:
    """A trainer that offers the weights of seed 1."""
    with offered_tensors(hf_tensors(seed=1)) as made:
        yield made


@asynccontextmanager
async def two_processes(
    make_server: MakeServer, trainer: SourceRank, **options: object
) -> AsyncIterator[tuple[AdminServer, AdminServer, str]]:
    """Two API processes of one running engine, and a plan to update it from the trainer."""
    server = make_server(**options)
    async with server.running():
        other = make_server(engine=server.engine)
        async with other.http:
            yield server, other, await server.plan(trainer.manifest)


async def prepare(
    server: AdminServer, plan_id: str, version: int = 1, request_id: str = "r", **more: object
) -> httpx.Response:
    body = {"plan_id": plan_id, "version": version, "request_id": request_id, **more}
    return await server.post("/weights/prepare", **body)


async def commit(server: AdminServer, request_id: str = "r") -> httpx.Response:
    return await server.post("/weights/commit", request_id=request_id)


async def abort(server: AdminServer, request_id: str = "r", **more: object) -> httpx.Response:
    return await server.post("/weights/abort", request_id=request_id, **more)


async def history(server: AdminServer) -> list[tuple[int, str]]:
    told = (await server.get("/weights")).json()["history"]
    return [(report["version"], report["outcome"]) for report in told]


def said(answer: httpx.Response, status: int, code: str) -> str:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    return str(answer.json()["detail"])


# -- prepare and commit -----------------------------------------------------------------------


@pytest.mark.parametrize("tp_size", [1, 2])
async def test_between_the_phases_the_old_weights_serve_and_nothing_else_may_begin(
    make_server: MakeServer, trainer: SourceRank, tp_size: int
) -> None:
    """Every byte is here, generation goes on, and each process says what is prepared."""
    async with two_processes(make_server, trainer, tp_size=tp_size) as (server, other, plan_id):
        old = server.engine.weights
        prepared = await prepare(server, plan_id, 7)
        assert prepared.status_code == 200, prepared.text
        report = prepared.json()
        assert (report["outcome"], report["mode"], report["paused_s"]) == ("prepared", "staged", 0)
        assert report["bytes_moved"] >= report["bytes_needed"] > 0
        for each in (server, other):
            state = await each.state()
            assert (state["state"], state["update"]["phase"]) == ("updating", "prepared")
            assert (state["update"]["version"], state["weights"]["version"]) == (7, None)
            assert state["update"]["bytes_done"] == report["bytes_moved"]
            for path in ("/pause", "/resume", "/flush"):
                assert "version 7 is prepared as 'r'" in said(
                    await each.post(path), 409, "illegal_state"
                )
            again = await prepare(each, plan_id, 8, "another")
            assert "commit or" in again.json()["remedy"]
            update = await each.post("/weights/update", plan_id=plan_id, version=9)
            assert "is prepared" in said(update, 409, "illegal_state")
        tokens = await server.engine.answer(1, 2)
        assert {token.weights for token in tokens} == {old}
        assert await history(server) == []
        assert not server.engine.paused


async def test_a_commit_on_another_process_installs_what_was_prepared(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Without one more byte from the trainer, which may be gone by then."""
    async with two_processes(make_server, trainer, tp_size=2) as (server, other, plan_id):
        assert (await prepare(server, plan_id, 7)).status_code == 200
        trainer.transport.close()
        committed = await commit(other)
        assert committed.status_code == 200, committed.text
        report = committed.json()
        assert (report["outcome"], report["version"], report["mode"]) == ("installed", 7, "staged")
        assert report["bytes_moved"] >= report["bytes_needed"] > 0
        assert 0 < report["paused_s"] <= report["seconds"]
        assert server.engine.serves(seed=1)
        assert server.engine.versions == [7]
        state = await server.state()
        assert (state["state"], state["update"], state["weights"]["version"]) == (
            "serving",
            None,
            7,
        )
        assert await history(server) == [(7, "installed")]


async def test_a_pause_of_the_caller_outlasts_both_phases(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """As in an update of one call: paused before, paused after."""
    async with two_processes(make_server, trainer) as (server, other, plan_id):
        await server.post("/pause", mode="keep")
        await prepare(server, plan_id)
        assert (await commit(other)).status_code == 200
        state = await server.state()
        assert (state["state"], state["pause"]["mode"]) == ("paused", "keep")


async def test_each_phase_is_carried_out_once(make_server: MakeServer, trainer: SourceRank) -> None:
    """By any process: the first answer again, and no other update under the same request_id."""
    async with two_processes(make_server, trainer) as (server, other, plan_id):
        first = await prepare(server, plan_id)
        assert (await prepare(other, plan_id)).json() == first.json()
        assert "named the update to version 1" in said(
            await prepare(other, plan_id, 2), 409, "illegal_state"
        )
        installed = await commit(server)
        for each in (other, server):
            assert (await commit(each)).json() == installed.json()
            assert (await prepare(each, plan_id)).json() == installed.json()
            assert "is installed" in said(await abort(each), 409, "illegal_state")
        assert server.engine.calls.count("start") == 1
        assert server.engine.versions == [1]


async def test_what_was_never_prepared_is_unknown(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """404 for commit and abort, also while another update is prepared."""
    async with two_processes(make_server, trainer) as (server, _, plan_id):
        for _ in range(2):
            for call in (commit, abort):
                assert "'nothing'" in said(await call(server, "nothing"), 404, "unknown_id")
            await prepare(server, plan_id)
        assert (await commit(server)).status_code == 200


# -- abort ------------------------------------------------------------------------------------


async def test_an_abort_leaves_everything_as_it_was(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """The old weights serve, the abort is in the history, and the next update works."""
    async with two_processes(make_server, trainer, tp_size=2) as (server, other, plan_id):
        await prepare(server, plan_id)
        aborted = await abort(other)
        assert (aborted.status_code, aborted.json()["outcome"]) == (200, "aborted")
        assert (await abort(server)).json() == aborted.json()
        for again in (await commit(server), await prepare(server, plan_id)):
            assert "aborted the update to version 1" in said(again, 409, "update_aborted")
        assert server.engine.serves(seed=0)
        assert (await server.state())["state"] == "serving"
        assert await history(server) == [(1, "aborted")]
        update = await server.post("/weights/update", plan_id=plan_id, version=1)
        assert update.status_code == 200, update.text


async def test_a_prepared_update_that_nobody_commits_is_given_up(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """By its deadline, by the process that prepared it; the history says why."""
    async with two_processes(make_server, trainer) as (server, other, plan_id):
        assert (await prepare(server, plan_id, timeout_s=0.3)).status_code == 200
        await server.until("serving")
        assert server.engine.serves(seed=0)
        told = (await other.get("/weights")).json()["history"][0]
        assert told["outcome"] == "aborted"
        assert "no commit came within 0.3 s" in told["error"]["detail"]
        assert "no commit came" in said(await commit(other), 409, "update_aborted")
        assert (await prepare(server, plan_id, 1, "next")).status_code == 200
        assert (await commit(server, "next")).status_code == 200


# -- failures ---------------------------------------------------------------------------------


async def test_a_prepare_that_fails_leaves_everything_as_it_was(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Repeated it fails alike; an abort of it is fine, for there is nothing to give up."""
    async with two_processes(make_server, trainer) as (server, other, plan_id):
        trainer.transport.close()
        failed = await prepare(server, plan_id)
        detail = said(failed, 503, "peer_lost")
        assert said(await prepare(other, plan_id), 503, "peer_lost") == detail
        assert said(await commit(other), 503, "peer_lost") == detail
        assert (await abort(other)).json()["outcome"] == "failed"
        assert (await server.state())["state"] == "serving"
        assert server.engine.serves(seed=0)


async def test_a_commit_that_fails_half_way_fences(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """From the first write on only completion may serve, as in an update of one call."""
    async with two_processes(make_server, trainer) as (server, other, plan_id):
        await prepare(server, plan_id)
        server.engine.ranks[0].installer.failures["install"] = 2
        failed = await commit(other)
        assert failed.status_code == 500, failed.text
        assert failed.json()["state"] == "fenced"
        assert (await commit(server)).json()["detail"] == failed.json()["detail"]
        assert (await prepare(server, plan_id, 1, "next")).status_code == 200
        assert (await server.state())["state"] == "updating"
        assert (await commit(other, "next")).status_code == 200
        assert (await server.state())["fence"] is None
        assert server.engine.serves(seed=1)


async def test_an_abort_on_a_fenced_engine_keeps_the_fence(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """What is there is still a mixture, and no request gets past it while one is prepared."""
    async with two_processes(make_server, trainer) as (server, _, plan_id):
        server.engine.ranks[0].installer.failures["install"] = 2
        await server.post("/weights/update", plan_id=plan_id, version=1)
        assert (await prepare(server, plan_id)).status_code == 200
        assert server.shared.read().fence is not None
        assert (await abort(server)).status_code == 200
        state = await server.state()
        assert state["state"] == "fenced"
        assert "version 1" in state["fence"]["detail"]
        assert server.engine.paused


async def test_what_is_prepared_waits_in_a_buffer(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """In place there is no such buffer; verification is not built."""
    async with two_processes(make_server, trainer) as (server, _, plan_id):
        assert "mode staged" in said(
            await prepare(server, plan_id, mode="in_place"), 422, "unsupported"
        )
        assert "verify" in said(await prepare(server, plan_id, verify="full"), 422, "unsupported")
        assert (await prepare(server, plan_id)).status_code == 200


async def test_a_version_that_is_not_newer_is_refused_at_once(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """At prepare, before a byte has moved; with force it goes on."""
    async with two_processes(make_server, trainer) as (server, _, plan_id):
        await prepare(server, plan_id, 5)
        await commit(server)
        assert "not newer" in said(await prepare(server, plan_id, 5, "s"), 409, "stale_version")
        assert (await prepare(server, plan_id, 5, "s", force=True)).status_code == 200
        assert (await commit(server, "s")).status_code == 200


# -- memory that cannot be won back -----------------------------------------------------------


async def test_bytes_that_may_still_land_in_live_weights_fence_for_good(
    make_server: MakeServer, trainer: SourceRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No update helps: each could be overwritten later. Every further one is refused."""
    async with two_processes(make_server, trainer) as (server, other, plan_id):
        rank = server.engine.ranks[0]
        monkeypatch.setitem(
            rank.service._calls, "abort", lambda: AbortAnswer(wrote=True, lost=True)
        )
        rank.fail_next("advance", TransportError("the wire broke"))
        failed = await server.post("/weights/update", plan_id=plan_id, version=3)
        assert "restart the engine" in failed.json()["remedy"]
        state = await other.state()
        assert (state["state"], state["fence"]["code"]) == ("fenced", "live_memory_lost")
        for path, body in (
            ("/weights/update", {"plan_id": plan_id, "version": 4}),
            ("/weights/prepare", {"plan_id": plan_id, "version": 4, "force": True}),
            ("/resume", {}),
        ):
            refused = await other.post(path, **body)
            assert "live_memory_lost" in said(refused, 409, "illegal_state")
            assert refused.json()["remedy"] == "restart the engine"


# -- a process that dies ----------------------------------------------------------------------


@pytest.mark.parametrize("touched", [False, True])
async def test_an_update_whose_process_died_is_given_up_by_the_next_call(
    make_server: MakeServer, trainer: SourceRank, monkeypatch: pytest.MonkeyPatch, touched: bool
) -> None:
    """The kernel has freed its lock. Back to the old weights, or a fence if any was written."""
    monkeypatch.setattr(transfers, "DRAIN_S", 0.1)
    async with two_processes(make_server, trainer) as (server, other, plan_id):
        trainer.transport.bytes_per_s = 0
        task = asyncio.create_task(prepare(server, plan_id))
        await server.until("updating", phase="pull")
        records = UpdateRecords(server.shared)
        record = records.read()
        assert record is not None
        (work,) = [each for each in server.service._background._tasks if not each.done()]
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await server.state())["state"] == "updating", "left behind"
        record.touched = touched
        records.keep(record)
        refused = await other.post("/flush")
        if touched:
            assert "process that carried" in said(refused, 409, "illegal_state")
            assert (await other.state())["state"] == "fenced"
        else:
            assert refused.status_code == 200
            assert (await other.state())["state"] == "serving"
        assert "process that carried" in said(await commit(other), 500, "update_failed")
        trainer.transport.bytes_per_s = None
        update = await other.post("/weights/update", plan_id=plan_id, version=1)
        assert update.status_code == 200, update.text
        assert server.engine.serves(seed=1)


async def test_an_engine_that_could_not_be_resumed_counts_as_paused(
    make_server: MakeServer, trainer: SourceRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still, so it must not be said to serve; a resume is the way out."""
    monkeypatch.setattr(transfers, "DRAIN_S", 0.1)
    async with two_processes(make_server, trainer) as (server, other, plan_id):
        trainer.transport.bytes_per_s = 0
        task = asyncio.create_task(prepare(server, plan_id))
        await server.until("updating", phase="pull")
        (work,) = [each for each in server.service._background._tasks if not each.done()]
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.engine.pause("keep")
        server.engine.fail_once.add("resume")
        await other.post("/flush")
        state = await other.state()
        assert (state["state"], server.engine.paused) == ("paused", True)
        assert state["pause"] == {"mode": "keep", "until": None}
        assert (await other.post("/resume")).json()["state"] == "serving"
        assert not server.engine.paused


async def test_the_record_of_an_update_that_had_ended_is_forgotten(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """A process that died after the last step leaves an engine that serves; it goes on so."""
    async with two_processes(make_server, trainer) as (server, other, plan_id):
        await prepare(server, plan_id)
        record = UpdateRecords(server.shared).read()
        assert record is not None
        await commit(server)
        UpdateRecords(server.shared).keep(record)
        assert (await other.post("/flush")).status_code == 200
        assert UpdateRecords(server.shared).read() is None
        assert server.engine.serves(seed=1)


async def test_a_fence_says_whether_it_is_for_good(make_server: MakeServer) -> None:
    """One that an older process wrote has no such word, and can be lifted."""
    server = make_server()
    old = msgspec.msgpack.encode(
        {"code": "c", "detail": "d", "remedy": "r", "attempted_version": 1}
    )
    fence = msgspec.msgpack.decode(old, type=Fence)
    assert not fence.for_good
    server.shared.change(lambda state: moved(state, "fenced", fence=fence))
    async with server.http:
        assert (await server.state())["fence"]["code"] == "c"
