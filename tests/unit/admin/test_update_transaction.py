"""Updates of a running engine: all of it or nothing, and whatever it is, it is said."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import psutil
import pytest
import torch

from engine_plugins.admin import update_transaction
from engine_plugins.errors import PeerLostError, TransportError
from engine_plugins.settings import Settings
from tests.support.admin_server import TOKEN, AdminServer
from tests.support.in_memory_model import hf_tensors, needed_bytes
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
async def connected(
    make_server: MakeServer, trainer: SourceRank, **options: object
) -> AsyncIterator[tuple[AdminServer, str]]:
    """A running server and a plan to update it from the trainer."""
    server = make_server(**options)
    async with server.running():
        yield server, await server.plan(trainer.manifest)


async def update(server: AdminServer, plan_id: str, version: int, **more: object) -> httpx.Response:
    return await server.post("/weights/update", plan_id=plan_id, version=version, **more)


# -- success ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
async def test_an_update_is_whole_reported_and_published(
    make_server: MakeServer, trainer: SourceRank, tp_size: int, mode: str
) -> None:
    """The trainer's bits on every rank, the version everywhere, and a report that adds up."""
    async with connected(make_server, trainer, tp_size=tp_size) as (server, plan_id):
        second = make_server(engine=server.engine)
        answer = await update(server, plan_id, 7, mode=mode, request_id="step-7")
        assert answer.status_code == 200, answer.text
        assert server.engine.serves(seed=1)
        report = answer.json()
        assert (report["version"], report["request_id"]) == (7, "step-7")
        assert (report["outcome"], report["mode"], report["error"]) == ("installed", mode, None)
        moved = report["bytes_moved"]
        assert report["bytes_needed"] == needed_bytes(hf_tensors(seed=1), tp_size)
        # Half a row of the projection that is cut by columns is short: its whole rows travel.
        assert report["bytes_needed"] <= moved <= tp_size * trainer.source.nbytes
        assert [rank["tp_rank"] for rank in report["ranks"]] == list(range(tp_size))
        assert sum(rank["bytes_moved"] for rank in report["ranks"]) == moved
        phases = report["phases"]
        for phase in ("connect_s", "plan_s", "pull_s", "pause_s", "install_s", "flush_s"):
            assert phases[phase] > 0, phase
        assert report["gbps"] == pytest.approx(moved / 1e9 / phases["pull_s"])
        assert 0 < report["paused_s"] <= report["seconds"]
        assert abs(report["finished_at"] - time.time()) < 60
        assert server.engine.versions == [7]
        async with second.http:
            for each in (server, second):
                state = await each.state()
                assert (state["state"], state["update"], state["fence"]) == ("serving", None, None)
                assert state["weights"]["version"] == 7
                assert state["weights"]["request_id"] == "step-7"
                told = (await each.get("/weights")).json()
                assert (told["version"], told["history"]) == (7, [report])


# -- which mode -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("staging_bytes", "mode"), [(0, "in_place"), (5000, "in_place"), (1 << 20, "staged")]
)
async def test_auto_stages_where_the_model_fits_the_memory_set_aside(
    make_server: MakeServer, trainer: SourceRank, staging_bytes: int, mode: str
) -> None:
    """A bound of the operator's own stands for the quarter."""
    settings = Settings(admin_token=TOKEN, staging_bytes=staging_bytes)
    async with connected(make_server, trainer, settings=settings) as (server, plan_id):
        assert (await update(server, plan_id, 1)).json()["mode"] == mode


def leave_free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Have the machine say that so much of its memory is available."""
    figures = psutil.virtual_memory()._replace(available=nbytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: figures)


@pytest.mark.parametrize(("tp_size", "mode"), [(1, "staged"), (2, "in_place")])
async def test_auto_asks_whether_all_ranks_of_the_host_together_fit(
    make_server: MakeServer,
    trainer: SourceRank,
    monkeypatch: pytest.MonkeyPatch,
    tp_size: int,
    mode: str,
) -> None:
    """In a quarter of what is free, with the figures in the report; no rank for itself alone."""
    async with connected(make_server, trainer, tp_size=tp_size) as (server, plan_id):
        one = server.engine.ranks[0].receiver.staging_room(plan_id).wanted_bytes
        leave_free(monkeypatch, int(4 * 1.3 * one))
        report = (await update(server, plan_id, 1)).json()
        assert report["mode"] == mode
        wanted, free = f"{tp_size * one / 1e6:.3g} MB", f"{4 * 1.3 * one / 1e6:.3g} MB"
        if mode == "staged":
            assert report["mode_reason"] == f"{wanted} of {free} free on the host"
        else:
            assert f"staging wants {wanted}, a quarter of what is free" in report["mode_reason"]


async def test_what_an_update_has_staged_is_room_for_the_next_one(
    make_server: MakeServer, trainer: SourceRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer is kept, so it is no longer free: that must not send every other one in place."""
    async with connected(make_server, trainer) as (server, plan_id):
        one = server.engine.ranks[0].receiver.staging_room(plan_id).wanted_bytes
        leave_free(monkeypatch, 4 * one)
        assert (await update(server, plan_id, 1)).json()["mode"] == "staged"
        leave_free(monkeypatch, 3 * one)
        assert (await update(server, plan_id, 2)).json()["mode"] == "staged"
        leave_free(monkeypatch, 2 * one)
        assert (await update(server, plan_id, 3)).json()["mode"] == "in_place"


async def test_staging_more_than_the_host_holds_is_refused_before_it_begins(
    make_server: MakeServer, trainer: SourceRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank would fit alone; together the kernel would end one of them."""
    async with connected(make_server, trainer, tp_size=2) as (server, plan_id):
        one = server.engine.ranks[0].receiver.staging_room(plan_id).wanted_bytes
        leave_free(monkeypatch, int(1.5 * one))
        refused = await update(server, plan_id, 1, mode="staged", request_id="r")
        assert (refused.status_code, refused.json()["code"]) == (422, "unsupported")
        assert "on 2 ranks together" in refused.json()["detail"]
        assert "start" not in server.engine.calls
        assert (await update(server, plan_id, 1, request_id="r")).json()["mode"] == "in_place"


# -- what the engine is asked -----------------------------------------------------------------


async def test_waiting_for_a_pull_asks_nothing_of_the_engine(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """A call takes the place of a step. How far the ranks are is on their pages."""
    async with connected(make_server, trainer, tp_size=2) as (server, plan_id):
        trainer.transport.bytes_per_s = SLOW
        before = len(server.engine.calls)
        report = (await update(server, plan_id, 1)).json()
        assert report["phases"]["pull_s"] > 0.2
        calls = server.engine.calls[before:]
        assert calls[: calls.index("pause keep")] == ["staging_room", "start"]


async def test_a_source_that_stands_still_holds_no_call_to_the_engine(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """It was met when the plan was made; the pull, which is a thread, finds that it gives nothing.

    The engine generates meanwhile, where it would have stood still for seconds.
    """
    async with connected(make_server, trainer) as (server, plan_id):
        trainer.transport.bytes_per_s = 0.0
        request = server.engine.submit(1)
        running = asyncio.create_task(update(server, plan_id, 1, timeout_s=1.0))
        await server.until("updating", phase="pull")
        tokens = len(request.tokens)
        await asyncio.sleep(0.3)
        assert len(request.tokens) > tokens + 10
        assert (await running).json()["code"] == "transfer_timeout"


async def test_the_next_versions_come_by_the_same_plan(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """As a trainer does it: step, update, step, update; newest report first."""
    async with connected(make_server, trainer) as (server, plan_id):
        for version in (1, 2, 3):
            trainer.hold(hf_tensors(seed=version))
            assert (await update(server, plan_id, version)).status_code == 200
            assert server.engine.serves(seed=version)
        history = (await server.get("/weights")).json()["history"]
        assert [report["version"] for report in history] == [3, 2, 1]


# -- requests and their KV --------------------------------------------------------------------


async def test_requests_in_flight_go_on_with_the_new_weights(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """None is dropped; every token is of whole weights, old ones first, then new ones.

    The loop of the in-memory engine fails the test if it generates from a half-loaded model.
    """
    async with connected(make_server, trainer, tp_size=2) as (server, plan_id):
        engine = server.engine
        for rank in engine.ranks:
            rank.installer.install_s = 0.02
        old = engine.weights
        request = engine.submit(1, 2, 3)
        await asyncio.sleep(0.02)
        assert (await update(server, plan_id, 1)).status_code == 200
        await asyncio.sleep(0.02)
        weights = [token.weights for token in request.tokens]
        assert set(weights) == {old, engine.weights}
        assert weights == sorted(weights, key=[old, engine.weights].index)
        assert request.finish_reason is None


@pytest.mark.parametrize("in_flight_kv", ["recompute", "keep"])
async def test_what_becomes_of_held_requests_kv_is_the_callers_choice(
    make_server: MakeServer, trainer: SourceRank, in_flight_kv: str
) -> None:
    """Recomputed by default; kept on demand. New requests meet no KV of older weights in both."""
    async with connected(make_server, trainer) as (server, plan_id):
        engine = server.engine
        old = engine.weights
        held = engine.submit(1, 2, 3)
        await engine.answer(1, 2)
        answer = await update(server, plan_id, 1, in_flight_kv=in_flight_kv, resume=False)
        assert answer.status_code == 200
        queued = engine.submit(1, 2, 3, max_tokens=2)
        before = len(held.tokens)
        await server.post("/resume")
        await asyncio.wait_for(queued.ended.wait(), 10)
        new = frozenset({engine.weights})
        for tokens in (queued.tokens, await engine.answer(1, 2), await engine.answer(1, 2, 3, 4)):
            assert {token.kv_weights for token in tokens} == {new}
        after = {weights for token in held.tokens[before:] for weights in token.kv_weights}
        assert after == (new if in_flight_kv == "recompute" else new | {old})


async def test_a_request_that_came_in_during_the_update_meets_no_old_kv(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """It was queued under the old mark, before the new weights were in."""
    async with connected(make_server, trainer) as (server, plan_id):
        engine = server.engine
        engine.ranks[0].installer.install_s = 0.05  # long enough to be met in it
        await engine.answer(1, 2)
        trainer.transport.bytes_per_s = SLOW
        await server.post("/pause")
        running = asyncio.create_task(update(server, plan_id, 1, in_flight_kv="keep"))
        await server.until("updating", phase="pull")
        early = engine.submit(1, 2, max_tokens=2)
        await server.until("updating", phase="install")
        late = engine.submit(1, 2, max_tokens=2)
        assert (await running).status_code == 200
        await server.post("/resume")
        for request in (early, late):
            await asyncio.wait_for(request.ended.wait(), 10)
            assert {token.kv_weights for token in request.tokens} == {frozenset({engine.weights})}


async def test_a_version_that_is_installed_again_shares_no_kv_with_the_first_time(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """By force the number may come again with other weights; the cache was kept all along."""
    async with connected(make_server, trainer) as (server, plan_id):
        for seed, version in ((1, 5), (2, 6), (3, 5), (4, 5)):
            trainer.hold(hf_tensors(seed=seed))
            answer = await update(server, plan_id, version, in_flight_kv="keep", force=True)
            assert answer.status_code == 200
            tokens = await server.engine.answer(1, 2)
            assert {t.kv_weights for t in tokens} == {frozenset({server.engine.weights})}


@pytest.mark.parametrize(("mode", "reason"), [("abort", "abort"), ("wait", "length")])
async def test_an_update_pauses_as_it_is_told(
    make_server: MakeServer, trainer: SourceRank, mode: str, reason: str
) -> None:
    """Requests end by abort, or are waited for."""
    async with connected(make_server, trainer) as (server, plan_id):
        old = server.engine.weights
        request = server.engine.submit(1, max_tokens=30)
        assert (await update(server, plan_id, 1, pause=mode)).status_code == 200
        assert request.finish_reason == reason
        assert {token.weights for token in request.tokens} <= {old}


@pytest.mark.parametrize(
    ("before", "resume", "after"),
    [
        ("serving", None, "serving"),
        ("serving", True, "serving"),
        ("serving", False, "paused"),
        ("paused", None, "paused"),
        ("paused", True, "serving"),
        ("paused", False, "paused"),
    ],
)
async def test_an_update_ends_in_the_state_that_was_asked_for(
    make_server: MakeServer, trainer: SourceRank, before: str, resume: bool | None, after: str
) -> None:
    """An engine that a caller had paused stays so unless told otherwise."""
    async with connected(make_server, trainer) as (server, plan_id):
        if before == "paused":
            await server.post("/pause", mode="keep")
        assert (await update(server, plan_id, 1, resume=resume)).status_code == 200
        state = await server.state()
        assert state["state"] == after
        assert server.engine.paused == (after == "paused")
        if before == after == "paused":
            assert state["pause"]["mode"] == "keep"
        if after == "paused":
            assert (await server.post("/resume")).json()["state"] == "serving"
        assert await server.engine.answer(1)


async def test_a_held_pause_that_runs_out_during_an_update_ends_after_it(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Not in the middle, and not never."""
    async with connected(make_server, trainer) as (server, plan_id):
        await server.post("/pause", hold_s=0.1)
        trainer.transport.bytes_per_s = SLOW
        assert (await update(server, plan_id, 1)).status_code == 200
        await server.until("serving", within_s=2)


# -- what is refused --------------------------------------------------------------------------


async def test_a_version_that_is_not_newer_needs_force(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """409 with both numbers and nothing changed; force installs it."""
    async with connected(make_server, trainer) as (server, plan_id):
        assert (await update(server, plan_id, 5)).status_code == 200
        trainer.hold(hf_tensors(seed=2))
        for version in (5, 4, 0):
            answer = await update(server, plan_id, version)
            assert (answer.status_code, answer.json()["code"]) == (409, "stale_version")
            assert f"version {version} is not newer than the installed 5" in answer.text
            assert "force" in answer.json()["remedy"]
        assert server.engine.serves(seed=1)
        assert (await update(server, plan_id, 4, force=True)).status_code == 200
        assert server.engine.serves(seed=2)
        assert (await server.state())["weights"]["version"] == 4


async def test_a_repeated_request_is_answered_and_not_carried_out_again(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """By any process: the first report, word for word, although the version is stale by now."""
    async with connected(make_server, trainer) as (server, plan_id):
        second = make_server(engine=server.engine)
        async with second.http:
            first = await update(server, plan_id, 1, request_id="once/../\n")
            trainer.hold(hf_tensors(seed=2))
            for each in (server, second):
                again = await update(each, plan_id, 1, request_id="once/../\n")
                assert (again.status_code, again.json()) == (200, first.json())
        assert server.engine.versions == [1]
        assert server.engine.serves(seed=1)


async def test_a_request_id_names_one_update_only(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Another version under a request_id that was used is 409, not the old answer."""
    async with connected(make_server, trainer) as (server, plan_id):
        assert (await update(server, plan_id, 1, request_id="same")).status_code == 200
        other = await update(server, plan_id, 2, request_id="same")
        assert (other.status_code, other.json()["code"]) == (409, "illegal_state")
        assert "version 1" in other.json()["detail"]
        assert server.engine.versions == [1]


async def test_a_refusal_may_be_repeated_under_its_request_id(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Nothing had begun, so nothing is remembered: mended, the same request works."""
    async with connected(make_server, trainer) as (server, plan_id):
        assert (await update(server, "plan-0", 1, request_id="r")).status_code == 404
        async with server.shared.operation("flush"):
            refused = await update(server, plan_id, 1, request_id="r", timeout_s=0.1)
            assert refused.status_code == 409
        assert (await update(server, plan_id, 1, request_id="r")).status_code == 200


async def test_during_a_pull_another_update_is_409_in_time_and_the_state_is_quick(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """In both processes; generation goes on, and the pull's progress shows.

    What the other one is told: the update that it waited for, as long as it could.
    """
    async with connected(make_server, trainer) as (server, plan_id):
        second = make_server(engine=server.engine)
        async with second.http:
            await second.state()
            trainer.transport.bytes_per_s = SLOW / 4
            request = server.engine.submit(1)
            running = asyncio.create_task(update(server, plan_id, 3, mode="staged"))
            await server.until("updating", phase="pull")
            seen, took = list[int](), list[float]()
            tokens = len(request.tokens)
            for each in itertools.cycle((server, second)):
                if len(seen) >= 6 and seen[-1] > seen[0]:
                    break
                began = time.monotonic()
                answer = await update(each, plan_id, 9, timeout_s=0.05)
                state = await each.state()
                took.append(time.monotonic() - began)
                assert (answer.status_code, answer.json()["code"]) == (409, "illegal_state")
                assert answer.json()["state"] == "updating"
                assert "version 3" in answer.json()["detail"]
                assert state["state"] == "updating"
                assert state["update"]["version"] == 3
                assert state["update"]["bytes_total"] == trainer.source.nbytes
                seen.append(state["update"]["bytes_done"])
                await asyncio.sleep(0.05)
            assert statistics.median(took) < 0.5, took
            assert seen == sorted(seen)
            assert len(request.tokens) > tokens
            trainer.transport.bytes_per_s = None
            assert (await running).status_code == 200
        assert server.engine.serves(seed=1)


# -- failures before the first write ----------------------------------------------------------


async def fails_and_leaves_everything(
    server: AdminServer, running: asyncio.Task[httpx.Response], status: int, code: str
) -> httpx.Response:
    """The answer of an update that failed before it wrote; the engine serves as if never asked."""
    answer = await running
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json()["remedy"]
    state = await server.state()
    assert (state["state"], state["fence"], state["update"]) == ("serving", None, None)
    assert state["weights"]["version"] is None
    assert server.engine.serves(seed=0)
    assert server.engine.versions == []
    assert await server.engine.answer(1, 2)
    history = (await server.get("/weights")).json()["history"]
    assert [report["outcome"] for report in history] == ["failed"]
    assert history[0]["error"]["code"] == code
    return answer


@pytest.mark.parametrize("tp_size", [1, 2])
async def test_a_peer_that_dies_in_the_pull_leaves_the_old_weights_serving(
    make_server: MakeServer, trainer: SourceRank, tp_size: int
) -> None:
    """Staged, nothing was written; requests in flight never noticed, the next update works."""
    async with connected(make_server, trainer, tp_size=tp_size) as (server, plan_id):
        request = server.engine.submit(1)
        trainer.transport.bytes_per_s = SLOW
        running = asyncio.create_task(update(server, plan_id, 3, mode="staged", request_id="r"))
        await server.until("updating", phase="pull")
        await asyncio.sleep(0.1)
        began = time.monotonic()
        trainer.transport.close()
        answer = await fails_and_leaves_everything(server, running, 503, "peer_lost")
        assert time.monotonic() - began < 5
        assert trainer.manifest.agent in answer.json()["detail"]
        assert request.finish_reason is None
        again = await update(server, plan_id, 3, request_id="r")
        assert (again.status_code, again.json()["detail"]) == (503, answer.json()["detail"])
        with offered_tensors(hf_tensors(seed=2)) as successor:
            new_plan = await server.plan(successor.manifest)
            assert (await update(server, new_plan, 3)).status_code == 200
        assert server.engine.serves(seed=2)


@pytest.mark.parametrize("failing", [0, 1])
async def test_one_rank_that_cannot_start_stops_all_before_anything_is_written(
    make_server: MakeServer, trainer: SourceRank, failing: int
) -> None:
    """The answers of the next calls are those of the next calls."""
    async with connected(make_server, trainer, tp_size=2) as (server, plan_id):
        server.engine.ranks[failing].fail_next("start", PeerLostError("gone for one"))
        running = asyncio.create_task(update(server, plan_id, 3))
        answer = await fails_and_leaves_everything(server, running, 503, "peer_lost")
        assert "gone for one (the other 1 ranks are well)" in answer.json()["detail"]
        assert (await update(server, plan_id, 3)).status_code == 200
        assert server.engine.serves(seed=1)


async def test_a_pull_past_its_time_is_504_with_rank_peer_tensor_and_bytes(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """The rank that waits knows whom it waits for, so it is the one that speaks."""
    async with connected(make_server, trainer) as (server, plan_id):
        trainer.transport.bytes_per_s = 0.0
        running = asyncio.create_task(update(server, plan_id, 3, timeout_s=0.3))
        answer = await fails_and_leaves_everything(server, running, 504, "transfer_timeout")
        detail = answer.json()["detail"]
        for said in ("rank 0", trainer.manifest.agent, "model.embed.weight", "0 of"):
            assert said in detail
        trainer.transport.bytes_per_s = None
        assert (await update(server, plan_id, 3)).status_code == 200


async def test_requests_that_cannot_be_drained_in_time_stop_the_update(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """504, everything as before, and the endless request goes on."""
    async with connected(make_server, trainer) as (server, plan_id):
        endless = server.engine.submit(1)
        await asyncio.sleep(0.01)
        running = asyncio.create_task(update(server, plan_id, 3, pause="wait", timeout_s=0.5))
        await fails_and_leaves_everything(server, running, 504, "pause_timeout")
        assert endless.finish_reason is None
        assert not server.engine.paused


async def test_a_failure_leaves_a_callers_pause_in_place(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Back to the former state means to paused, if that was it."""
    async with connected(make_server, trainer) as (server, plan_id):
        await server.post("/pause", mode="keep")
        trainer.transport.close()
        assert (await update(server, plan_id, 3)).status_code == 503
        state = await server.state()
        assert (state["state"], state["pause"]["mode"]) == ("paused", "keep")
        assert server.engine.paused


# -- failures after the first write -----------------------------------------------------------


def break_install(server: AdminServer, failing: int) -> None:
    server.engine.ranks[failing].installer.failures["install"] = 2


def break_begin(server: AdminServer, failing: int) -> None:
    server.engine.ranks[failing].installer.failures["begin"] = 0


def break_engine_finish(server: AdminServer, failing: int) -> None:
    server.engine.ranks[failing].installer.failures["finish"] = 0


def break_finish(server: AdminServer, failing: int) -> None:
    server.engine.ranks[failing].fail_next("finish", TransportError("no answer"))


def break_abandon_too(server: AdminServer, failing: int) -> None:
    break_install(server, failing)
    server.engine.ranks[failing].installer.failures["abandon"] = 0


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    "break_it", [break_install, break_begin, break_engine_finish, break_finish, break_abandon_too]
)
async def test_a_failure_after_a_write_fences_the_engine_until_an_update_completes(
    make_server: MakeServer,
    trainer: SourceRank,
    failing: int,
    break_it: Callable[[AdminServer, int], None],
) -> None:
    """No generation, no resume, no version; held requests end with an error; a repeat mends it."""
    async with connected(make_server, trainer, tp_size=2) as (server, plan_id):
        second = make_server(engine=server.engine)
        assert (await update(server, plan_id, 2)).status_code == 200
        trainer.hold(hf_tensors(seed=2))
        held = server.engine.submit(1, 2)
        await asyncio.sleep(0.01)
        break_it(server, failing)
        answer = await update(server, plan_id, 3, request_id="r")
        assert answer.status_code == 500, answer.text
        assert answer.json()["state"] == "fenced"
        assert "fenced" in answer.json()["remedy"]
        assert held.finish_reason == "error"
        assert server.engine.paused
        assert server.engine.versions == [2]
        async with second.http:
            for each in (server, second):
                state = await each.state()
                assert (state["state"], state["pause"], state["update"]) == ("fenced", None, None)
                assert state["weights"]["version"] is None, "no label for a mixture"
                assert "version 3" in state["fence"]["detail"]
                assert "new request_id" in state["fence"]["remedy"]
                assert (await each.get("/weights")).json()["version"] is None
                for path in ("/resume", "/pause", "/flush"):
                    refused = await each.post(path)
                    assert (refused.status_code, refused.json()["state"]) == (409, "fenced")
            queued = server.engine.submit(1)
            await asyncio.sleep(0.03)
            assert queued.tokens == []
            stale = await update(second, plan_id, 2)
            assert (stale.status_code, stale.json()["code"]) == (409, "stale_version")
            assert "older than 3" in stale.json()["detail"]
            again = await update(second, plan_id, 3, request_id="r")
            assert (again.status_code, again.json()["detail"]) == (500, answer.json()["detail"])
            for rank in server.engine.ranks:
                rank.installer.loading = False  # what a real engine's abandon would have mended
            assert (await update(second, plan_id, 3)).status_code == 200
        assert server.engine.serves(seed=2)
        state = await server.state()
        assert (state["state"], state["fence"], state["weights"]["version"]) == ("serving", None, 3)
        await asyncio.sleep(0.02)
        assert {token.weights for token in queued.tokens} == {server.engine.weights}
        outcomes = [each["outcome"] for each in (await server.get("/weights")).json()["history"]]
        assert outcomes == ["installed", "failed", "installed"]


@pytest.mark.parametrize("call", ["flush", "isolate_kv", "publish_version", "resume"])
async def test_a_failure_after_every_rank_has_finished_fences_too(
    make_server: MakeServer, trainer: SourceRank, call: str
) -> None:
    """The weights are whole by then, but caches or labels may be old: nothing serves from that."""
    async with connected(make_server, trainer) as (server, plan_id):
        server.engine.fail_once.add(call)
        answer = await update(server, plan_id, 3)
        assert (answer.status_code, answer.json()["state"]) == (500, "fenced")
        assert call in answer.json()["detail"]
        assert server.engine.paused
        assert (await server.state())["weights"]["version"] is None
        assert (await update(server, plan_id, 3)).status_code == 200
        assert (await server.state())["weights"]["version"] == 3
        assert not server.engine.paused


async def test_a_newer_version_or_an_older_one_by_force_lifts_the_fence(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """A repeat that fails again keeps it closed."""
    async with connected(make_server, trainer) as (server, plan_id):
        for version, force in ((8, False), (2, True)):
            break_install(server, 0)
            assert (await update(server, plan_id, 7, force=force)).json()["state"] == "fenced"
            break_install(server, 0)
            assert (await update(server, plan_id, 7)).json()["state"] == "fenced"
            trainer.hold(hf_tensors(seed=version))
            assert (await update(server, plan_id, version, force=force)).status_code == 200
            assert server.engine.serves(seed=version)
            assert (await server.state())["state"] == "serving"


async def test_a_fenced_engine_whose_next_pull_fails_stays_fenced(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Nothing was written this time, but what is there is still a mixture."""
    async with connected(make_server, trainer) as (server, plan_id):
        break_install(server, 0)
        await update(server, plan_id, 7)
        trainer.transport.close()
        answer = await update(server, plan_id, 7)
        assert (answer.status_code, answer.json()["state"]) == (503, "fenced")
        assert "old weights serve on" not in answer.json()["remedy"]
        state = await server.state()
        assert "version 7" in state["fence"]["detail"]
        assert server.engine.paused


async def test_a_peer_that_dies_while_modules_are_installed_fences(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """In place there is no second copy: a pull that breaks half way leaves a mixture."""
    async with connected(make_server, trainer) as (server, plan_id):
        trainer.transport.bytes_per_s = SLOW
        running = asyncio.create_task(update(server, plan_id, 3, mode="in_place"))
        await server.until("updating", phase="install")
        trainer.transport.close()
        answer = await running
        assert (answer.status_code, answer.json()["code"]) == (503, "peer_lost")
        assert answer.json()["state"] == "fenced"
        assert not server.engine.serves(seed=0)


async def test_an_install_that_outlives_the_update_is_504_and_fences(
    make_server: MakeServer, trainer: SourceRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is here and the engine is too slow: the deadline is the update's own."""
    monkeypatch.setattr(update_transaction, "ADVANCE_S", 0.01)
    monkeypatch.setattr(update_transaction, "GRACE_S", 0.0)
    async with connected(make_server, trainer) as (server, plan_id):
        server.engine.ranks[0].installer.install_s = 0.1
        answer = await update(server, plan_id, 3, mode="staged", timeout_s=0.25)
        assert (answer.status_code, answer.json()["state"]) == (504, "fenced")
        assert "of 6 modules installed" in answer.json()["detail"]


async def test_an_engine_that_dies_in_an_update_is_fenced_all_the_same(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """Nobody can be asked what was written, so the answer is the careful one."""
    async with connected(make_server, trainer) as (server, plan_id):
        server.engine.ranks[0].installer.install_s = 0.05
        running = asyncio.create_task(update(server, plan_id, 3))
        await server.until("updating", phase="install")
        server.engine.dead = True
        answer = await running
        assert (answer.status_code, answer.json()["code"]) == (500, "engine_call_failed")
        assert server.shared.read().state == "fenced"


# -- callers ----------------------------------------------------------------------------------


async def test_a_caller_that_hangs_up_stops_nothing_and_opens_nothing(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """The update goes on, still alone; its answer waits under its request_id."""
    async with connected(make_server, trainer) as (server, plan_id):
        trainer.transport.bytes_per_s = SLOW
        caller = asyncio.create_task(update(server, plan_id, 3, request_id="r", mode="staged"))
        await server.until("updating", phase="pull")
        caller.cancel()
        await asyncio.sleep(0.01)
        with pytest.raises(Exception, match="under way"):
            async with server.shared.operation("flush"):
                pass
        await server.until("serving")
        assert server.engine.serves(seed=1)
        answer = await update(server, plan_id, 3, request_id="r")
        assert (answer.status_code, answer.json()["outcome"]) == (200, "installed")


async def test_ranks_hear_of_nothing_between_updates(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """A second trainer's offer while one is connected; each plan brings its own weights."""
    with offered_tensors({k: torch.zeros_like(v) for k, v in hf_tensors(seed=1).items()}) as zero:
        async with connected(make_server, trainer, tp_size=2) as (server, plan_id):
            other = await server.plan(zero.manifest)
            assert (await update(server, other, 1)).status_code == 200
            assert not server.engine.serves(seed=1)
            assert (await update(server, plan_id, 2)).status_code == 200
            assert server.engine.serves(seed=1)
