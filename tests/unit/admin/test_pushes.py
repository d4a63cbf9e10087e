"""Pushes: the trainer writes between prepare and commit, and nobody serves what is half written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import msgspec
import pytest

from engine_plugins.admin.update_record import UpdateRecords
from engine_plugins.weights.contract.report import PlanSummary
from engine_plugins.weights.transport.transfers import run_transfers
from tests.support.admin_server import AdminServer
from tests.support.in_memory_model import hf_tensors
from tests.support.source_ranks import SourceRank, offered_tensors

pytestmark = pytest.mark.anyio

MakeServer = Callable[..., AdminServer]


@pytest.fixture
def trainer() -> Iterator[SourceRank]:
    """A trainer that holds the weights of seed 1."""
    with offered_tensors(hf_tensors(seed=1)) as made:
        yield made


@asynccontextmanager
async def pushed(
    make_server: MakeServer, trainer: SourceRank, **options: object
) -> AsyncIterator[tuple[AdminServer, AdminServer, PlanSummary]]:
    """Two API processes of one running engine, and a plan for the trainer to write by."""
    server = make_server(**options)
    async with server.running():
        other = make_server(engine=server.engine)
        async with other.http:
            yield server, other, await connected(server, trainer)


async def connected(server: AdminServer, trainer: SourceRank) -> PlanSummary:
    answer = await server.connect([trainer.manifest], direction="push")
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=PlanSummary)


def write(trainer: SourceRank, plan: PlanSummary) -> int:
    """All that the plan asks of this trainer; the bytes written."""
    writes = []
    for destination in plan.destinations:
        trainer.transport.add_peer(destination.agent, destination.agent_metadata)
        for mine, theirs, rows in destination.writes[trainer.transport.agent].by_devices():
            writes.append(
                trainer.transport.prepare_write(
                    destination.agent, rows, local_device=mine, remote_device=theirs
                )
            )
    return run_transfers(writes, deadline_s=10)


async def prepare(
    server: AdminServer, plan: PlanSummary, version: int = 1, **more: object
) -> httpx.Response:
    body = {"plan_id": plan.plan_id, "version": version, "request_id": f"r{version}", **more}
    return await server.post("/weights/prepare", **body)


async def commit(server: AdminServer, version: int = 1) -> httpx.Response:
    return await server.post("/weights/commit", request_id=f"r{version}")


async def abort(server: AdminServer, version: int = 1, **more: object) -> httpx.Response:
    return await server.post("/weights/abort", request_id=f"r{version}", **more)


async def proven(server: AdminServer, trainer: SourceRank) -> PlanSummary:
    """A first update through the loader, after which bytes may land in live parameters."""
    plan = await server.plan(trainer.manifest)
    answer = await server.post("/weights/update", plan_id=plan, version=0)
    assert answer.status_code == 200, answer.text
    return await connected(server, trainer)


@pytest.mark.parametrize("tp_size", [1, 2])
async def test_the_old_weights_serve_while_the_trainer_writes(
    make_server: MakeServer, trainer: SourceRank, tp_size: int
) -> None:
    """Into a receive buffer; then the other process commits, for as many versions as there are."""
    async with pushed(make_server, trainer, tp_size=tp_size) as (server, other, plan):
        assert [each.tp_rank for each in plan.destinations] == list(range(tp_size))
        kept = (await other.get("/weights")).json()["plans"][0]
        assert (kept["direction"], kept["destinations"]) == ("push", [])
        for version in (1, 2):
            old = server.engine.weights
            trainer.hold(hf_tensors(seed=version))
            prepared = (await prepare(server, plan, version)).json()
            assert (prepared["outcome"], prepared["mode"]) == ("prepared", "staged")
            written = write(trainer, plan)
            assert {token.weights for token in await server.engine.answer(1)} == {old}
            committed = await commit(other, version)
            assert committed.status_code == 200, committed.text
            assert committed.json()["bytes_moved"] == written == plan.bytes_to_move
            assert server.engine.serves(seed=version)
            assert (await server.state())["weights"]["version"] == version


async def test_an_update_in_one_call_is_refused(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Nothing would have been written; the answer says how it goes."""
    async with pushed(make_server, trainer) as (server, _, plan):
        answer = await server.post("/weights/update", plan_id=plan.plan_id, version=1)
        assert (answer.status_code, answer.json()["code"]) == (409, "illegal_state")
        assert "/weights/prepare, write" in answer.json()["remedy"]
        assert (await server.state())["state"] == "serving"


@pytest.mark.parametrize("writes_ended", [True, False])
async def test_an_abort_leaves_the_old_weights_serving(
    make_server: MakeServer, trainer: SourceRank, writes_ended: bool
) -> None:
    """A buffer that may still be written to is given up; the next plan has another one."""
    async with pushed(make_server, trainer) as (server, other, plan):
        assert (await prepare(server, plan)).status_code == 200
        assert (await abort(other, writes_ended=writes_ended)).status_code == 200
        assert server.engine.serves(seed=0)
        again = await prepare(server, plan, 2)
        if not writes_ended:
            assert (again.status_code, again.json()["code"]) == (404, "unknown_id")
            plan = await connected(server, trainer)
            assert (await prepare(server, plan, 3)).status_code == 200
        assert (await server.state())["update"]["phase"] == "prepared"


# -- into live parameters ---------------------------------------------------------------------


async def test_the_engine_stands_still_while_live_parameters_are_written(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """From prepare on; no request may use KV of the old weights afterwards."""
    async with pushed(make_server, trainer, direct_landing=True) as (server, other, _):
        plan = await proven(server, trainer)
        assert plan.direct_bytes == plan.bytes_needed
        trainer.hold(hf_tensors(seed=2))
        await server.engine.answer(1, 2)
        prepared = (await prepare(server, plan)).json()
        assert (prepared["outcome"], prepared["mode"]) == ("prepared", "in_place")
        assert server.engine.paused
        queued = server.engine.submit(1, 2, max_tokens=2)
        write(trainer, plan)
        report = (await commit(other)).json()
        assert report["direct_bytes"] == plan.direct_bytes
        assert report["staged_bytes"] == report["loader_bytes"] == 0
        assert 0 < report["paused_s"] <= report["seconds"]
        assert server.engine.serves(seed=2)
        await queued.ended.wait()
        assert {token.kv_weights for token in queued.tokens} == {frozenset({server.engine.weights})}


async def test_an_abort_after_live_parameters_were_opened_fences(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Some bytes may be new. Where the writes have ended, a later push mends it."""
    async with pushed(make_server, trainer, direct_landing=True) as (server, other, _):
        plan = await proven(server, trainer)
        trainer.hold(hf_tensors(seed=2))
        await prepare(server, plan)
        assert (await abort(other, writes_ended=True)).json()["outcome"] == "aborted"
        state = await server.state()
        assert (state["state"], state["fence"]["code"]) == ("fenced", "update_aborted")
        for rank in server.engine.ranks:
            rank.installer.loading = False  # what a real engine's abandon would have mended
        assert (await prepare(server, plan, 2)).status_code == 200
        write(trainer, plan)
        assert (await commit(server, 2)).status_code == 200
        assert server.engine.serves(seed=2)
        assert (await server.state())["fence"] is None


@pytest.mark.parametrize("overdue", [True, False])
async def test_writes_that_may_still_land_in_live_parameters_fence_for_good(
    make_server: MakeServer, trainer: SourceRank, overdue: bool
) -> None:
    """A trainer that never came back, or that does not know: only a restart helps."""
    async with pushed(make_server, trainer, direct_landing=True) as (server, other, _):
        plan = await proven(server, trainer)
        assert (await prepare(server, plan, timeout_s=0.3 if overdue else 30)).status_code == 200
        if not overdue:
            assert (await abort(other)).status_code == 200
        await server.until("fenced")
        assert (await other.state())["fence"]["code"] == "live_memory_lost"
        refused = await prepare(other, plan, 2)
        assert (refused.status_code, refused.json()["remedy"]) == (409, "restart the engine")


async def test_mode_staged_is_refused_where_live_parameters_are_written(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """It promises old weights until the commit; and nothing has begun."""
    async with pushed(make_server, trainer, direct_landing=True) as (server, _, _):
        plan = await proven(server, trainer)
        answer = await prepare(server, plan, mode="staged")
        assert (answer.status_code, answer.json()["code"]) == (422, "unsupported")
        assert UpdateRecords(server.shared).read() is None


async def test_writes_that_end_soon_after_the_deadline_cost_no_engine(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """The trainer ends what is under way and says so; only then is the memory known to be still."""
    async with pushed(make_server, trainer, direct_landing=True) as (server, other, _):
        plan = await proven(server, trainer)
        assert plan.direct_bytes
        assert (await prepare(server, plan, timeout_s=0.3)).status_code == 200
        await asyncio.sleep(0.6)
        write(trainer, plan)
        answer = await abort(other, writes_ended=True)
        assert answer.json()["outcome"] == "aborted"
        fence = (await server.state())["fence"]
        assert fence["code"] != "live_memory_lost"
        again = await connected(server, trainer)
        assert (await prepare(server, again, 2)).status_code == 200
        write(trainer, again)
        assert (await commit(other, 2)).status_code == 200
