"""One rank of two cannot begin, and another breaks as it wakes: on live engines of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.configurations import NEW, OLD
from tests.support.engine_server import EngineServer
from tests.support.engines import Engine
from tests.support.offers import offered
from tests.support.problems import problem
from tests.support.streams import Stream
from tests.support.waiting import until

pytestmark = pytest.mark.engine

PROMPT = OLD.prompts()[0]


@pytest.fixture(scope="module")
def server(real_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    """An engine of two ranks that nobody has asked anything yet."""
    folder = tmp_path_factory.mktemp("server")
    model = OLD.copy_to(folder / "model")
    log = folder / "server.log"
    environment = {**real_engine.environment, "ENGINE_PLUGINS_RESIDUAL_POLICY": "observe"}
    with real_engine.serve(model, log, tensor_parallel=2, environment=environment) as server:
        yield server


def test_a_rank_that_cannot_begin_leaves_no_answer_for_the_next_call(server: EngineServer) -> None:
    """An exception of another kind than ours, on the first rank; its sister has answered."""
    (runtime_dir,) = server.log.parent.glob("engine-plugins-*")
    in_the_way = runtime_dir / "ranks" / "tp0.page"
    in_the_way.mkdir()
    for _ in range(2):
        told = problem(server.admin.get("/memory"), 500, "engine_call_failed")
        assert "tp0.page" in told
        assert "the other 1 ranks are well" in told
    in_the_way.rmdir()
    rows = server.admin.get("/memory").raise_for_status().json()["rows"]
    assert [row["tp_rank"] for row in rows] == [0, 1]
    until(lambda: len(server.state()["workers"]) == 2, otherwise=server.state)


def test_a_wake_that_breaks_ends_held_requests_and_takes_the_version_back(
    server: EngineServer,
) -> None:
    """The file with a rank's weights is gone: nothing serves, nobody waits, and a restart helps."""
    with offered(server.admin, NEW.tensors()) as offer:
        assert offer.update(1).json()["version"] == 1
    server.greedy(PROMPT, 2)  # the first request of a server takes long
    held = Stream(server, PROMPT, 400)
    held.wait_for(5)
    with ThreadPoolExecutor(1) as background:
        asleep = server.admin.post("/sleep", json={"level": 1}).raise_for_status().json()
        assert asleep["weights"]["version"] == 1
        queued = background.submit(server.complete, PROMPT)
        _lose_weights(server.state()["workers"][1]["pid"])
        told = server.admin.post("/wake")
        assert "ends too early" in problem(told, 500, "engine_call_failed")
        assert told.json()["remedy"] == "the engine is fenced; restart the engine"
        assert queued.result(20).status_code == 503
    held.result()
    assert held.finish_reason == "error"
    state = server.state()
    assert (state["state"], state["weights"]["version"]) == ("fenced", None)
    assert state["fence"]["code"] == "wake_failed"
    assert state["requests"] == {"running": 0, "waiting": 0}
    for route in ("/wake", "/sleep", "/resume"):
        refused = server.admin.post(route)
        assert "wake_failed" in problem(refused, 409, "illegal_state")
        assert refused.json()["remedy"] == "restart the engine"
    assert server.complete(PROMPT).status_code == 503


def _lose_weights(pid: int) -> None:
    """Empty the file without a name in which a rank's weights wait."""
    folder = Path(f"/proc/{pid}/fd")
    sleeping = [
        each
        for each in folder.iterdir()
        if os.readlink(each).endswith("(deleted)") and each.stat().st_size > 1 << 16
    ]
    for each in sleeping:
        os.truncate(each, 0)
    assert sleeping
