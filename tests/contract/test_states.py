"""What State says, and which moves are legal; those of an update are in its own tests."""

from __future__ import annotations

import psutil
import pytest

from tests.support.configurations import DENSE, DENSE_TP2, OLD, on
from tests.support.engine_server import EngineServer
from tests.support.problems import problem
from tests.support.served import Served
from tests.support.waiting import until

BOTH_CACHES = {"flushed": ["prefix_cache", "multimodal_cache"]}


@pytest.fixture(autouse=True)
def old_weights(served: Served) -> None:
    """Every test begins with the old weights serving."""
    served.restore(OLD)


@on(DENSE, DENSE_TP2)
def test_the_state_says_what_the_engine_is(served: Served) -> None:
    """Its kind and versions, and one live process for each rank."""
    server, ranks = served.server, served.configuration.tensor_parallel
    until(lambda: bool(server.state()["workers"]), otherwise=server.state)
    state = server.state()
    assert (state["state"], state["pause"], state["fence"]) == ("serving", None, None)
    assert (state["update"], state["sleep"]) == (None, None)
    engine = state["engine"]
    assert engine["kind"] == server.kind
    assert engine["version"]
    assert engine["plugin_version"]
    assert (engine["tensor_parallel_size"], engine["pipeline_parallel_size"]) == (ranks, 1)
    assert [worker["tp_rank"] for worker in state["workers"]] == list(range(ranks))
    for worker in state["workers"]:
        assert psutil.pid_exists(worker["pid"])
    assert state["requests"] == {"running": 0, "waiting": 0}


@on(DENSE)
def test_resume_without_a_pause_changes_nothing(server: EngineServer) -> None:
    """200 as often as it is called; the engine answers as before."""
    since = server.state()["since"]
    for _ in range(3):
        resumed = server.admin.post("/resume")
        assert resumed.status_code == 200
        assert (resumed.json()["state"], resumed.json()["since"]) == ("serving", since)
    assert server.greedy(OLD.prompts()[0]) == OLD.expected()[0]


@on(DENSE)
@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_pausing_again_is_fine_in_the_same_mode_only(server: EngineServer, mode: str) -> None:
    """200 with the state; 409 with the way out for another mode, which changes nothing."""
    other = "abort" if mode == "keep" else "keep"
    for _ in range(2):
        paused = server.admin.post("/pause", json={"mode": mode})
        assert paused.status_code == 200, paused.text
        assert (paused.json()["state"], paused.json()["pause"]["mode"]) == ("paused", mode)
    refused = server.admin.post("/pause", json={"mode": other})
    assert f"already paused with mode {mode}" in problem(refused, 409, "illegal_state")
    assert refused.json()["state"] == "paused"
    assert "resume" in refused.json()["remedy"]
    assert server.state()["pause"]["mode"] == mode
    assert server.admin.post("/resume").json()["state"] == "serving"
    assert server.greedy(OLD.prompts()[0]) == OLD.expected()[0]


@on(DENSE)
def test_a_pause_with_hold_ends_by_itself(server: EngineServer) -> None:
    """hold_s: a caller that vanished does not leave the engine paused for ever."""
    server.admin.post("/pause", json={"hold_s": 0.5}).raise_for_status()
    assert server.state()["pause"]["until"] is not None
    until(lambda: server.state()["state"] == "serving", within_s=10, otherwise=server.state)
    assert server.greedy(OLD.prompts()[0]) == OLD.expected()[0]


@on(DENSE, DENSE_TP2)
def test_flush_works_while_serving_and_while_paused(server: EngineServer) -> None:
    """And says which caches it emptied; answers stay right."""
    assert server.admin.post("/flush").json() == BOTH_CACHES
    server.admin.post("/pause").raise_for_status()
    assert server.admin.post("/flush").json() == BOTH_CACHES
    only = server.admin.post("/flush", json={"multimodal_cache": False})
    assert only.json() == {"flushed": ["prefix_cache"]}
    neither = {"prefix_cache": False, "multimodal_cache": False}
    assert server.admin.post("/flush", json=neither).json() == {"flushed": []}
    server.admin.post("/resume").raise_for_status()
    assert server.greedy(OLD.prompts()[0]) == OLD.expected()[0]


@on(DENSE)
def test_routes_that_there_are_not(server: EngineServer) -> None:
    """404 and 405 are problems too, and the document lists what there is."""
    assert server.admin.get("/nothing").json()["code"] == "unknown_route"
    assert server.admin.get("/pause").json()["code"] == "method_not_allowed"
    document = server.admin.get("/openapi.json").json()
    assert {"/pause", "/state", "/weights/update"} <= document["paths"].keys()
