"""The routes' behaviour: states and the moves between them, seen by every API process."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from engine_plugins.admin import service as service_module
from engine_plugins.admin import viewing
from engine_plugins.admin.engine_control import RequestCounts
from engine_plugins.admin.state import Fence, Sleep, UpdateProgress, moved
from engine_plugins.errors import EngineCallError, WeightMismatchError
from engine_plugins.weights.contract.manifest import SourceManifest
from tests.support.admin_server import AdminServer
from tests.support.in_memory_model import hf_tensors, needed_bytes
from tests.support.source_ranks import offered_tensors

pytestmark = pytest.mark.anyio

MakeServer = Callable[..., AdminServer]
FENCE = Fence(code="peer_lost", detail="half", remedy="repeat", attempted_version=5)


async def test_the_state_says_what_the_engine_is_and_does(make_server: MakeServer) -> None:
    """Every field of the contract, with nothing asked of a busy engine twice."""
    server = make_server(tp_size=2)
    async with server.running():
        server.engine.submit(1, 2)
        await asyncio.sleep(0.02)
        while not (state := await server.state())["workers"]:
            pass  # a busy machine may need longer than a state waits
        await server.state()
        assert server.engine.calls.count("describe") == 1
    assert state["engine"] == {
        "kind": "in_memory",
        "version": "1.0",
        "plugin_version": "1.0",
        "model": "tiny",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 1,
    }
    assert [worker["tp_rank"] for worker in state["workers"]] == [0, 1]
    assert all(worker["pid"] > 0 for worker in state["workers"])
    assert state["state"] == "serving"
    assert state["weights"] == {
        "version": None,
        "request_id": None,
        "installed_at": None,
        "digest": None,
    }
    assert state["requests"] == {"running": 1, "waiting": 0}
    assert state["pause"] is state["fence"] is state["update"] is state["sleep"] is None
    assert not {"kv_life", "kv_generation"} & state.keys()


async def test_the_state_is_answered_although_the_engine_is_busy_or_dead(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who the workers are is told later; the rest at once."""
    monkeypatch.setattr(viewing, "BUSY_WAIT_S", 0.05)
    server = make_server()
    async with server.running():
        async with server.engine.busy():
            began = time.monotonic()
            assert (await server.state())["workers"] == []
            assert time.monotonic() - began < 5
        await _known_workers(server)
    dead = make_server()
    dead.engine.dead = True
    async with dead.running():
        assert (await dead.state())["workers"] == []
        dead.engine.dead = False
        await _known_workers(dead)


async def _known_workers(server: AdminServer) -> None:
    """Until the state names a worker: on a busy machine the workers answer later than it does."""
    for _ in range(1000):
        if (await server.state())["workers"]:
            break
        await asyncio.sleep(0.01)
    assert len((await server.state())["workers"]) == 1


# -- pause and resume -------------------------------------------------------------------------


async def test_pause_keep_freezes_requests_and_resume_lets_them_go_on(
    make_server: MakeServer,
) -> None:
    """Nothing is generated meanwhile, new requests are held, nobody is dropped."""
    server = make_server()
    async with server.running():
        engine = server.engine
        old = engine.submit(1, 2, max_tokens=200)
        await asyncio.sleep(0.02)
        answer = await server.post("/pause")
        assert answer.status_code == 200
        assert answer.json()["state"] == "paused"
        assert answer.json()["pause"] == {"mode": "keep", "until": None}
        new = engine.submit(3, max_tokens=1)
        before = len(old.tokens)
        await asyncio.sleep(0.03)
        assert (len(old.tokens), new.tokens) == (before, [])
        assert 0 < before < 200
        assert (await server.state())["requests"] == {"running": 1, "waiting": 1}
        answer = await server.post("/resume")
        assert (answer.json()["state"], answer.json()["pause"]) == ("serving", None)
        await asyncio.wait_for(asyncio.gather(old.ended.wait(), new.ended.wait()), 10)
        assert old.finish_reason == new.finish_reason == "length"


async def test_pause_abort_ends_requests_and_pause_wait_drains_them(
    make_server: MakeServer,
) -> None:
    """Each in its own way; requests that come during the wait are held."""
    server = make_server()
    async with server.running():
        request = server.engine.submit(1)
        await server.post("/pause", mode="abort")
        assert request.finish_reason == "abort"
        await server.post("/resume")
        request = server.engine.submit(1, max_tokens=20)
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(server.post("/pause", mode="wait"))
        await asyncio.sleep(0.005)
        late = server.engine.submit(2, max_tokens=1)
        assert (await waiting).json()["state"] == "paused"
        assert (request.finish_reason, late.finish_reason) == ("length", None)


async def test_pausing_twice_in_the_same_mode_is_fine_and_in_another_is_not(
    make_server: MakeServer,
) -> None:
    """200 without another call of the engine; 409 that names the mode and the way out."""
    server = make_server()
    async with server.running():
        assert (await server.post("/pause", mode="keep")).status_code == 200
        assert (await server.post("/pause", mode="keep")).status_code == 200
        assert server.engine.calls.count("pause keep") == 1
        answer = await server.post("/pause", mode="abort")
        assert answer.status_code == 409
        assert answer.json()["state"] == "paused"
        assert "keep" in answer.json()["detail"]
        assert "resume" in answer.json()["remedy"]
        for _ in range(2):
            assert (await server.post("/resume")).json()["state"] == "serving"
            assert not server.engine.paused


async def test_a_pause_that_takes_too_long_is_504_and_the_engine_serves_on(
    make_server: MakeServer,
) -> None:
    """Back in the former state, with its requests; the next pause works."""
    server = make_server()
    async with server.running():
        endless = server.engine.submit(1)
        await asyncio.sleep(0.01)
        began = time.monotonic()
        answer = await server.post("/pause", mode="wait", timeout_s=0.1)
        assert time.monotonic() - began < 5
        assert (answer.status_code, answer.json()["code"]) == (504, "pause_timeout")
        assert "0.1 s" in answer.json()["detail"]
        assert answer.json()["state"] == "serving"
        assert not server.engine.paused
        before = len(endless.tokens)
        await asyncio.sleep(0.03)
        assert len(endless.tokens) > before
        assert endless.finish_reason is None
        assert (await server.post("/pause")).json()["state"] == "paused"


async def test_an_engine_that_cannot_pause_is_told_as_it_is(make_server: MakeServer) -> None:
    """A dead engine's answer becomes 500; the state does not claim a pause."""
    server = make_server()
    async with server.running():
        server.engine.dead = True
        answer = await server.post("/pause")
        assert (answer.status_code, answer.json()["code"]) == (500, "engine_call_failed")
        assert answer.json()["state"] == "serving"


async def test_a_caller_that_hangs_up_does_not_leave_a_pause_half_done(
    make_server: MakeServer,
) -> None:
    """The engine stands still in the end, so the state says so in the end."""
    server = make_server()
    async with server.running():
        server.engine.submit(1, max_tokens=20)
        await asyncio.sleep(0.01)
        caller = asyncio.create_task(server.post("/pause", mode="wait"))
        await asyncio.sleep(0.01)
        caller.cancel()
        await server.until("paused")
        assert server.engine.paused


async def test_a_pause_may_end_by_itself(make_server: MakeServer) -> None:
    """`hold_s` bounds what a trainer that dies while it holds an engine can do."""
    server = make_server()
    async with server.running():
        began = time.time()
        pause = (await server.post("/pause", hold_s=0.1)).json()["pause"]
        assert began + 0.1 <= pause["until"] < began + 5
        await server.until("serving")
        assert time.time() - began > 0.09
        assert not server.engine.paused


async def test_a_pause_that_was_resumed_is_not_ended_by_its_time(make_server: MakeServer) -> None:
    """The next caller's pause is another one."""
    server = make_server()
    async with server.running():
        await server.post("/pause", hold_s=0.05)
        await server.post("/resume")
        await server.post("/pause")
        await asyncio.sleep(0.15)
        assert (await server.state())["state"] == "paused"


@pytest.mark.parametrize("holds", [(None, 0.05), (0.05, None)])
async def test_only_a_resume_ends_an_indefinite_pause(
    make_server: MakeServer, holds: tuple[float | None, float | None]
) -> None:
    """Another caller's `hold_s` runs beside it, whichever came first."""
    server = make_server()
    async with server.running():
        for hold_s in holds:
            await server.post("/pause", hold_s=hold_s)
        assert (await server.state())["pause"] == {"mode": "keep", "until": None}
        await asyncio.sleep(0.2)
        assert (await server.state())["state"] == "paused"
        assert server.engine.paused
        assert (await server.post("/resume")).json()["state"] == "serving"


async def test_the_longest_of_several_holds_counts(make_server: MakeServer) -> None:
    """The engine serves again when no pause is left."""
    server = make_server()
    async with server.running():
        longest = (await server.post("/pause", hold_s=0.6)).json()["pause"]
        assert (await server.post("/pause", hold_s=0.05)).json()["pause"] == longest
        await asyncio.sleep(0.25)
        assert (await server.state())["state"] == "paused"
        await server.until("serving")
        assert time.time() >= longest["until"] - 0.05


async def test_a_pause_whose_time_ends_during_another_call_ends_after_it(
    make_server: MakeServer,
) -> None:
    """The way is barred for a moment; the promise stands."""
    server = make_server()
    async with server.running():
        await server.post("/pause", hold_s=0.5)
        async with server.shared.operation("update"):
            await asyncio.sleep(0.6)
            assert server.shared.read().state == "paused"
        await server.until("serving")


# -- illegal moves ----------------------------------------------------------------------------

UPDATE = {"plan_id": "p", "version": 9}


MOVES: list[tuple[str, dict[str, Any]]] = [("/resume", {}), ("/pause", {}), ("/flush", {})]
ASLEEP = Sleep(level=1, released=["weights"], since=0.0, resume=True)
CONNECT: tuple[str, dict[str, Any]] = ("/weights/connect", {"source_ids": ["x"]})


@pytest.mark.parametrize(
    ("state", "way_out", "moves"),
    [
        ("fenced", "weights/update", MOVES),
        ("asleep", "wake", [*MOVES, CONNECT]),
    ],
)
async def test_an_illegal_move_is_409_with_the_state_and_the_way_out(
    make_server: MakeServer, state: Any, way_out: str, moves: list[tuple[str, dict[str, Any]]]
) -> None:
    """And nothing is asked of the engine. Planning is allowed behind a fence: it is the way out."""
    server = make_server()
    async with server.running():
        server.shared.change(
            lambda now: moved(
                now,
                state,
                fence=FENCE if state == "fenced" else None,
                sleep=ASLEEP if state == "asleep" else None,
            )
        )
        calls = list(server.engine.calls)
        for path, body in moves:
            answer = await server.post(path, **body)
            assert (answer.status_code, answer.json()["code"]) == (409, "illegal_state")
            assert answer.json()["state"] == state
            assert f"while {state}" in answer.json()["detail"]
            assert way_out in answer.json()["remedy"]
            if state == "fenced":
                assert "half" in answer.json()["detail"], "the fence's reason"
        assert server.engine.calls == calls


async def test_whatever_changes_the_state_is_refused_while_an_update_does(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, from any process, and soon; reading goes on."""
    monkeypatch.setattr(service_module, "MOST_WAIT_S", 0.1)
    first = make_server()
    second = make_server(engine=first.engine)
    async with first.running(), second.http:
        first.shared.change(
            lambda now: moved(
                now,
                "updating",
                update=UpdateProgress(
                    request_id="r", version=7, phase="pull", bytes_done=1, bytes_total=2
                ),
            )
        )
        async with first.shared.operation("update"):
            for path, body in (
                ("/pause", {}),
                ("/resume", {}),
                ("/flush", {}),
                ("/weights/connect", {"source_ids": ["x"]}),
                ("/weights/update", UPDATE | {"timeout_s": 0.1}),
            ):
                for server in (first, second):
                    began = time.monotonic()
                    answer = await server.post(path, **body)
                    assert time.monotonic() - began < 5
                    assert answer.status_code == 409
                    assert "the update to version 7 (pull;" in answer.json()["detail"]
                    assert f"process {os.getpid()}, for" in answer.json()["detail"]
            state = await second.state()
            assert state["update"]["bytes_total"] == 2
            assert (await second.get("/weights")).status_code == 200


# -- flush, sources, plans --------------------------------------------------------------------


async def test_flush_empties_what_was_asked_also_while_paused(make_server: MakeServer) -> None:
    """And says what."""
    server = make_server()
    async with server.running():
        await server.engine.answer(1, 2)
        assert server.engine.prefix_cache
        answer = await server.post("/flush", prefix_cache=False)
        assert answer.json() == {"flushed": ["multimodal_cache"]}
        assert server.engine.prefix_cache
        await server.post("/pause")
        answer = await server.post("/flush")
        assert answer.json() == {"flushed": ["prefix_cache", "multimodal_cache"]}
        assert not server.engine.prefix_cache


async def test_a_plan_says_what_will_move(make_server: MakeServer) -> None:
    """Totals are the sums of the ranks'; it is listed from then on, in every process."""
    first = make_server(tp_size=2)
    second = make_server(engine=first.engine)
    tensors = hf_tensors(seed=1)
    with offered_tensors(tensors) as trainer:
        async with first.running(), second.http:
            plan = (await first.connect([trainer.manifest])).json()
            listed = (await second.get("/weights")).json()["plans"]
    assert [each["plan_id"] for each in listed] == [plan["plan_id"]]
    assert listed == [plan]
    assert [rank["tp_rank"] for rank in plan["ranks"]] == [0, 1]
    assert plan["bytes_needed"] == needed_bytes(tensors, tp_size=2)
    assert plan["loader_bytes"] == plan["bytes_needed"]
    assert (plan["direct_bytes"], plan["staged_bytes"]) == (0, 0)
    for name in ("bytes_needed", "bytes_to_move", "operations"):
        assert plan[name] == sum(rank[name] for rank in plan["ranks"]) > 0


async def test_an_engine_without_our_methods_is_found_at_connect(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update that needs them to end well would be fenced."""
    server = make_server()

    async def request_counts() -> RequestCounts:
        raise EngineCallError("vLLM has no attribute 'engine_plugins_request_counts'")

    with offered_tensors(hf_tensors(seed=1)) as trainer:
        async with server.running():
            monkeypatch.setattr(server.engine, "request_counts", request_counts)
            answer = await server.connect([trainer.manifest])
            assert (answer.status_code, answer.json()["code"]) == (500, "engine_call_failed")
            assert "has no attribute" in answer.json()["detail"]
            assert "connect" not in server.engine.calls


async def test_an_offer_that_does_not_fit_is_422_and_changes_nothing(
    make_server: MakeServer,
) -> None:
    """Names, shapes, models, agents: said by name, with the engine serving on."""
    server = make_server(tp_size=2)
    good = hf_tensors(seed=1)
    missing = {name: data for name, data in good.items() if "layers.1.v_proj" not in name}
    extra = good | {"model.vision.weight": good["model.norm.weight"]}
    short = good | {"model.norm.weight": good["model.norm.weight"][:-1]}
    half = good | {"model.norm.weight": good["model.norm.weight"].bfloat16()}
    async with server.running():
        before = server.shared.read()
        for tensors, said in (
            (missing, "model.layers.1.v_proj.weight"),
            (extra, "model.vision.weight"),
            (short, "model.norm.weight"),
            (half, "bfloat16"),
        ):
            with offered_tensors(tensors) as trainer:
                answer = await server.connect([trainer.manifest])
            assert (answer.status_code, answer.json()["code"]) == (422, "weight_mismatch")
            assert said in answer.json()["detail"]
        with offered_tensors(good, model={"hidden_size": 32}) as trainer:
            answer = await server.connect([trainer.manifest])
            assert (answer.status_code, answer.json()["code"]) == (422, "weight_mismatch")
            assert "hidden_size 32" in answer.json()["detail"]
        with offered_tensors(good) as trainer:
            answer = await server.connect([trainer.manifest], model={"model_type": "llama"})
            assert answer.status_code == 422
            twins = [trainer.manifest, _renamed(trainer.manifest)]
            answer = await server.connect(twins)
            assert answer.status_code == 422
            assert trainer.manifest.agent in answer.json()["detail"]
        assert (await server.get("/weights")).json()["plans"] == []
        assert server.shared.read() == before
        assert server.engine.serves(seed=0)


async def test_the_dtypes_that_tensors_should_have_are_told_where_asked(
    make_server: MakeServer,
) -> None:
    """In place of a plan, once everything else fits; in those dtypes there is one."""
    server = make_server(tp_size=2)
    good = hf_tensors(seed=1)
    held = {name: each.half() if "norm" in name else each for name, each in good.items()}
    held["model.embed.weight"] = held["model.embed.weight"].bfloat16()
    async with server.running():
        with offered_tensors(held) as trainer:
            answer = await server.connect([trainer.manifest], tell_dtypes=True)
            told = answer.json()
        assert (answer.status_code, told["plan_id"], told["ranks"]) == (200, "", [])
        assert told["wanted"] == {"float32": ["model.embed.weight", "model.norm.weight"]}
        assert (await server.get("/weights")).json()["plans"] == []
        update = {"plan_id": "", "version": 1, "request_id": "r1"}
        assert (await server.post("/weights/update", **update)).is_client_error
        held["model.norm.weight"] = held["model.norm.weight"][:-1]
        with offered_tensors(held) as trainer:
            answer = await server.connect([trainer.manifest], tell_dtypes=True)
        assert (answer.status_code, answer.json()["code"]) == (422, "weight_mismatch")
        assert "model.norm.weight" in answer.json()["detail"]
        with offered_tensors(good) as trainer:
            answer = await server.connect([trainer.manifest], tell_dtypes=True)
            told = answer.json()
        assert (told["wanted"], len(told["ranks"])) == ({}, 2)
        assert told["plan_id"]


def _renamed(manifest: SourceManifest) -> SourceManifest:
    return msgspec.structs.replace(manifest, source="another rank")


async def test_a_peer_that_is_gone_is_told_at_connect(make_server: MakeServer) -> None:
    """503: the trainer's process is to be mended, not the request."""
    server = make_server()
    async with server.running():
        with offered_tensors(hf_tensors(seed=1)) as trainer:
            manifest = trainer.manifest
        answer = await server.connect([manifest])
        assert (answer.status_code, answer.json()["code"]) == (503, "peer_lost")
        assert manifest.agent in answer.json()["detail"]


async def test_a_part_that_changes_no_weight_is_refused(make_server: MakeServer) -> None:
    """A loader may drop all that is offered: a version would name weights that nobody sent."""
    server = make_server()
    async with server.running():
        dropped = {"model.rotary_emb.inv_freq": torch.ones(4)}
        with offered_tensors(dropped) as trainer:
            manifest = msgspec.structs.replace(trainer.manifest, partial=True)
            answer = await server.connect([manifest])
        assert (answer.status_code, answer.json()["code"]) == (422, "weight_mismatch")
        assert "no weight would change" in answer.json()["detail"]
        assert not server.engine.ranks[0].receiver._connected


@pytest.mark.parametrize("failing", [0, 1])
async def test_a_plan_that_one_rank_refuses_is_no_plan_on_any(
    make_server: MakeServer, failing: int
) -> None:
    """The error is that rank's own; the others forget it, and the next plan works."""
    server = make_server(tp_size=2)
    async with server.running():
        with offered_tensors(hf_tensors(seed=1)) as trainer:
            server.engine.ranks[failing].fail_next("connect", WeightMismatchError("not mine"))
            answer = await server.connect([trainer.manifest])
            assert (answer.status_code, answer.json()["code"]) == (422, "weight_mismatch")
            assert "not mine" in answer.json()["detail"]
            assert "the other 1 ranks are well" in answer.json()["detail"]
            assert all(not rank.receiver._connected for rank in server.engine.ranks)
            assert (await server.connect([trainer.manifest])).status_code == 200


async def test_old_plans_are_forgotten_everywhere(make_server: MakeServer) -> None:
    """A trainer that connects anew for every step must not fill the engine."""
    server = make_server()
    async with server.running():
        with offered_tensors(hf_tensors(seed=1)) as trainer:
            plans = [await server.plan(trainer.manifest) for _ in range(10)]
            (rank,) = server.engine.ranks
            assert list(rank.receiver._connected) == plans[2:]
            listed = (await server.get("/weights")).json()["plans"]
            assert {each["plan_id"] for each in listed} == set(plans[2:])
            answer = await server.post("/weights/update", plan_id=plans[0], version=1)
            assert (answer.status_code, answer.json()["code"]) == (404, "unknown_id")
            assert "connect" in answer.json()["remedy"]


async def test_processes_share_sources(make_server: MakeServer) -> None:
    """A manifest that one API process took is found by the other."""
    first = make_server()
    second = make_server(engine=first.engine)
    async with first.running(), second.http:
        with offered_tensors(hf_tensors(seed=1)) as trainer:
            source_id = (await first.publish(trainer.manifest)).json()["source_id"]
            again = (await second.publish(trainer.manifest)).json()["source_id"]
            assert again == source_id
            answer = await second.post("/weights/connect", source_ids=[source_id])
            assert answer.status_code == 200
