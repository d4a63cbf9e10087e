"""Everything that goes wrong between a trainer and an engine of two ranks.

The wire is tcp, where a stopped trainer really stalls a read. Every call goes over a new
connection, so where there are two API processes either may answer it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.support.configurations import DENSE_TP2, NEW, OLD, on
from tests.support.engine_server import EngineServer
from tests.support.hf_reference import greedy, reference_model
from tests.support.problems import problem
from tests.support.served import Served
from tests.support.stepping import Steps
from tests.support.streams import Stream
from tests.support.trainer_process import TrainerProcess
from tests.support.waiting import until

pytestmark = on(DENSE_TP2)

PROMPT = OLD.prompts()[0]
HALF_WAY = 12
"""A module in the middle of the model's 35."""


@pytest.fixture(autouse=True)
def healthy(served: Served) -> Iterator[None]:
    """Every test begins and ends with a right answer, from the processes that were there."""
    served.restore(OLD)
    pids = _pids(served)
    yield
    served.restore(OLD)
    assert OLD.wrong_answers(served.server.greedy) == []
    assert _pids(served) == pids
    assert all(psutil.pid_exists(pid) for pid in pids)


def _pids(served: Served) -> list[int]:
    server = served.server
    until(lambda: bool(server.state()["workers"]), otherwise=server.state)
    return [server.pid, *(worker["pid"] for worker in server.state()["workers"])]


def _installing(server: EngineServer) -> None:
    """Wait until an update is in the middle of it."""
    until(lambda: _phase(server) == "install", otherwise=server.state)


def _phase(server: EngineServer) -> str | None:
    update = server.state()["update"]
    return None if update is None else update["phase"]


def _check_fenced(server: EngineServer, version: int) -> None:
    """No half-new answer and no way around it, whichever API process is asked."""
    for _ in range(4):
        state = server.state()
        assert state["state"] == "fenced"
        assert f"version {version}" in state["fence"]["detail"]
        assert state["weights"]["version"] is None, "no version names a mixture"
        for route in ("/resume", "/pause", "/flush"):
            refused = server.admin.post(route)
            assert "fenced" in problem(refused, 409, "illegal_state")
            assert (refused.json()["state"], refused.json()["remedy"]) == ("fenced", WAY_OUT)
        answer = server.complete(PROMPT)
        assert answer.status_code == 503, answer.text
        assert "fenced" in answer.text
    assert _streamed_error(server) is not None, "a fenced engine streamed an answer"


WAY_OUT = "complete a weight update: POST /admin/v1/weights/update"


def _streamed_error(server: EngineServer) -> str | None:
    """What a stream is told: 503 before it opens, or an error as its only event."""
    try:
        events = list(server.stream(PROMPT, 4))
    except httpx.HTTPStatusError as refused:
        return str(refused) if refused.response.status_code == 503 else None
    assert not any(event.token_ids for event in events)
    return events[-1].error


@pytest.mark.parametrize("mode", ["in_place", "auto"])
def test_a_trainer_that_dies_before_anything_is_installed(
    served: Served, trainer: TrainerProcess, background: ThreadPoolExecutor, mode: str
) -> None:
    """Named within 5 s; the old weights serve on as if nothing had been."""
    server, plan = served.server, trainer.connect(served.server.admin)
    before = server.state()["weights"]
    trainer.signal(signal.SIGSTOP)
    pull = background.submit(served.update, plan, mode=mode)
    until(lambda: _phase(server) == "pull", otherwise=server.state)
    trainer.signal(signal.SIGKILL)
    died = time.monotonic()
    answer = pull.result(30)
    assert time.monotonic() - died < 5
    assert trainer.name in problem(answer, 503, "peer_lost")
    assert answer.json()["state"] == "serving"
    assert server.state()["weights"] == before
    assert OLD.wrong_answers(server.greedy) == []


def test_a_trainer_that_is_dead_already(served: Served, trainer: TrainerProcess) -> None:
    """Killed between connect and update."""
    plan = trainer.connect(served.server.admin)
    trainer.signal(signal.SIGKILL)
    asked = time.monotonic()
    answer = served.update(plan)
    assert time.monotonic() - asked < 5
    assert trainer.name in problem(answer, 503, "peer_lost")
    assert served.server.state()["state"] == "serving"
    assert OLD.wrong_answers(served.server.greedy) == []


def test_a_trainer_that_dies_half_way_fences_the_engine(
    served: Served, trainer: TrainerProcess, steps: Steps, background: ThreadPoolExecutor
) -> None:
    """No half-new answer: held and queued requests end with an error, new ones get 503.

    A repeat of the version lifts the fence; an older one may not.
    """
    server, plan = served.server, trainer.connect(served.server.admin)
    version = served.next_version() + 1
    held = Stream(server, PROMPT, 400)
    held.wait_for(5)
    held_whole = background.submit(server.complete, PROMPT, 400)
    hold = steps.hold(rank=0, module=HALF_WAY)
    update = background.submit(served.update, plan, version, mode="in_place")
    _installing(server)
    queued = background.submit(server.complete, PROMPT)
    queued_stream = background.submit(_streamed_error, server)
    time.sleep(0.3)
    trainer.signal(signal.SIGKILL)
    hold.unlink()
    answer = update.result(30)
    assert trainer.name in problem(answer, 503, "peer_lost")
    assert answer.json()["state"] == "fenced"
    _check_fenced(server, version)
    assert held.result() == greedy(reference_model(OLD.folder), PROMPT, len(held.ids))
    assert held.finish_reason == "error"
    for whole in (held_whole, queued):
        assert whole.result(30).status_code == 503, whole.result().text
    assert queued_stream.result(30) is not None

    offer = served.offer(NEW)
    problem(offer.update(version - 1), 409, "stale_version")
    _check_fenced(server, version)
    lifted = offer.update(version)
    assert lifted.status_code == 200, lifted.text
    state = server.state()
    assert (state["state"], state["fence"]) == ("serving", None)
    assert state["weights"]["version"] == version
    assert NEW.wrong_answers(server.greedy) == []


def test_requests_that_come_as_a_fence_closes_all_end(
    served: Served, trainer: TrainerProcess, steps: Steps, background: ThreadPoolExecutor
) -> None:
    """Those let in before it and on their way to the engine too: a hang tells nobody anything."""
    server, plan = served.server, trainer.connect(served.server.admin)
    fenced, version = threading.Event(), served.next_version()

    def client() -> list[int]:
        statuses = []
        while not fenced.is_set():
            statuses.append(server.complete(PROMPT, 1).status_code)
        return statuses

    clients = [background.submit(client) for _ in range(5)]
    time.sleep(0.3)
    steps.fail(0, HALF_WAY)
    problem(served.update(plan, version), 500, "engine_call_failed")
    time.sleep(0.2)
    fenced.set()
    for each in clients:
        assert set(each.result(15)) == {200, 503}
    assert server.state()["requests"] == {"running": 0, "waiting": 0}
    _check_fenced(server, version)


def test_a_trainer_that_stops_half_way_fences_the_engine(
    served: Served, trainer: TrainerProcess, steps: Steps, background: ThreadPoolExecutor
) -> None:
    """Neither dead nor moving: named when the deadline passes, and nothing serves."""
    server, plan = served.server, trainer.connect(served.server.admin)
    version = served.next_version()
    hold = steps.hold(rank=1, module=HALF_WAY)
    began = time.monotonic()
    update = background.submit(served.update, plan, version, timeout_s=3.0, mode="in_place")
    _installing(server)
    trainer.signal(signal.SIGSTOP)
    hold.unlink()
    answer = update.result(30)
    assert time.monotonic() - began < 15
    detail = problem(answer, 504, "transfer_timeout")
    assert trainer.name in detail or "rank" in detail
    _check_fenced(server, version)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("at", [1, HALF_WAY])
def test_a_failure_on_one_rank_alone(
    served: Served, trainer: TrainerProcess, steps: Steps, rank: int, at: int
) -> None:
    """The other rank is well, and yet nothing half-new serves; the next update is right.

    No answer of one call is taken for that of the next.
    """
    server, plan = served.server, trainer.connect(served.server.admin)
    version = served.next_version()
    steps.fail(rank, at)
    once = {"request_id": f"fails-{version}"}
    failed = served.update(plan, version, **once)
    detail = problem(failed, 500, "engine_call_failed")
    assert f"rank {rank}" in detail
    assert "the other 1 ranks are well" in detail
    _check_fenced(server, version)
    again = served.update(plan, version, **once)
    assert problem(again, 500, "engine_call_failed") == detail, "answered as before"
    lifted = served.update(plan, version)
    assert lifted.status_code == 200, lifted.text
    assert NEW.wrong_answers(server.greedy) == []
    assert [each["tp_rank"] for each in lifted.json()["ranks"]] == [0, 1]


def test_a_deadline_that_passes_half_way(
    served: Served, trainer: TrainerProcess, steps: Steps, background: ThreadPoolExecutor
) -> None:
    """timeout_s: 504 that names the rank and how far it came, and a fence."""
    server, plan = served.server, trainer.connect(served.server.admin)
    version = served.next_version()
    hold = steps.hold(rank=1, module=HALF_WAY)
    update = background.submit(served.update, plan, version, timeout_s=2.0)
    _installing(server)
    time.sleep(2.5)
    hold.unlink()
    assert "rank" in problem(update.result(30), 504, "transfer_timeout")
    _check_fenced(server, version)


def test_a_stopped_trainer_is_named_when_the_deadline_passes(
    served: Served, trainer: TrainerProcess
) -> None:
    """NIXL would wait for ever; ours gives up, names the peer and the tensors, and serves on."""
    server, plan = served.server, trainer.connect(served.server.admin)
    trainer.signal(signal.SIGSTOP)
    asked = time.monotonic()
    answer = served.update(plan, timeout_s=2.0)
    assert time.monotonic() - asked < 10
    detail = problem(answer, 504, "transfer_timeout")
    assert trainer.name in detail or "rank" in detail
    assert server.state()["state"] == "serving"
    assert OLD.wrong_answers(server.greedy) == []


def test_a_failed_update_leaves_a_callers_pause_in_place(
    served: Served, trainer: TrainerProcess
) -> None:
    """Paused before, paused after; only its caller ends it."""
    server, plan = served.server, trainer.connect(served.server.admin)
    server.admin.post("/pause", json={"mode": "keep"}).raise_for_status()
    trainer.signal(signal.SIGKILL)
    problem(served.update(plan), 503, "peer_lost")
    assert (server.state()["state"], server.state()["pause"]["mode"]) == ("paused", "keep")
    server.admin.post("/resume").raise_for_status()
    assert OLD.wrong_answers(server.greedy) == []


def test_the_version_changes_once_and_only_when_every_rank_has_it(
    served: Served, trainer: TrainerProcess, steps: Steps, background: ThreadPoolExecutor
) -> None:
    """Half way through, the old version is the last word; afterwards there is one entry more."""
    server, plan = served.server, trainer.connect(served.server.admin)
    before = served.install(OLD)["version"]
    history = server.admin.get("/weights").json()["history"]
    hold = steps.hold(rank=1, module=HALF_WAY)
    update = background.submit(served.update, plan, before + 3)
    _installing(server)
    for _ in range(4):
        assert server.state()["weights"]["version"] == before
        assert server.admin.get("/weights").json()["version"] == before
    hold.unlink()
    report = update.result(30).json()
    assert server.state()["weights"]["version"] == before + 3
    assert server.admin.get("/weights").json()["history"] == [report, *history]
