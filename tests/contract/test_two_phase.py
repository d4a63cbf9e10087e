"""Updates in two phases: every byte is there before anything changes, on one engine or on all."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine_plugins.sender.report import EnginesFailedError
from engine_plugins.trainer_sender import WeightSender
from tests.support.configurations import DENSE, DENSE_TP2, NEW, OLD, on
from tests.support.engine_server import TOKEN, EngineServer
from tests.support.in_memory_server import in_memory_server
from tests.support.problems import problem
from tests.support.served import Served
from tests.support.stepping import Steps
from tests.support.trainer_process import TrainerProcess
from tests.support.waiting import until


class TwoPhase:
    """One update of a server, call by call; each call may meet another API process."""

    def __init__(self, served: Served, plan_id: str) -> None:
        self.server, self.plan_id = served.server, plan_id
        self.version = served.next_version()
        self.request_id = f"two-phase {self.version}"

    def prepare(self, **more: Any) -> httpx.Response:
        body = {
            "plan_id": self.plan_id,
            "version": self.version,
            "request_id": self.request_id,
            **more,
        }
        return self.server.admin.post("/weights/prepare", json=body)

    def commit(self) -> httpx.Response:
        return self._about("commit")

    def abort(self) -> httpx.Response:
        return self._about("abort")

    def _about(self, call: str) -> httpx.Response:
        body = {"request_id": self.request_id}
        return self.server.admin.post(f"/weights/{call}", json=body)


@pytest.fixture
def update(served: Served) -> TwoPhase:
    """An update of the old weights to the new ones."""
    served.restore(OLD)
    connected = served.offer(NEW).connect()
    assert connected.status_code == 200, connected.text
    return TwoPhase(served, connected.json()["plan_id"])


def _serves(server: EngineServer, model: Any) -> None:
    assert model.wrong_answers(server.greedy) == []


@on(DENSE, DENSE_TP2)
def test_the_old_weights_serve_until_the_commit(served: Served, update: TwoPhase) -> None:
    """Tokens, state and version are those of before, then those of the new weights at once."""
    server, before = served.server, served.server.state()["weights"]
    prepared = update.prepare()
    assert prepared.status_code == 200, prepared.text
    assert (prepared.json()["outcome"], prepared.json()["mode"]) == ("prepared", "staged")
    for _ in range(3):
        state = server.state()
        assert (state["state"], state["weights"]) == ("updating", before)
        assert (state["update"]["phase"], state["update"]["version"]) == (
            "prepared",
            update.version,
        )
        for route in ("/pause", "/resume", "/flush"):
            assert "is prepared" in problem(server.admin.post(route), 409, "illegal_state")
        assert update.prepare().json() == prepared.json()
        _serves(server, OLD)
    committed = update.commit()
    assert committed.status_code == 200, committed.text
    _serves(server, NEW)
    assert committed.json()["bytes_moved"] >= committed.json()["bytes_needed"] > 0
    assert [update.commit().json() for _ in range(3)] == [committed.json()] * 3
    assert server.state()["weights"]["version"] == update.version
    assert "is installed" in problem(update.abort(), 409, "illegal_state")


@on(DENSE, DENSE_TP2)
def test_an_abort_keeps_the_old_weights(served: Served, update: TwoPhase) -> None:
    """As often as it is said; what was aborted cannot be committed, and the next one can."""
    assert update.prepare().status_code == 200
    for _ in range(3):
        aborted = update.abort()
        assert (aborted.status_code, aborted.json()["outcome"]) == (200, "aborted")
        problem(update.commit(), 409, "update_aborted")
    assert served.server.state()["state"] == "serving"
    _serves(served.server, OLD)
    served.install(NEW)
    _serves(served.server, NEW)


@on(DENSE, DENSE_TP2)
def test_an_update_that_nobody_commits_is_given_up(served: Served, update: TwoPhase) -> None:
    """At its deadline: the engine is free again, and the history says why."""
    server = served.server
    assert update.prepare(timeout_s=1.5).status_code == 200
    until(lambda: server.state()["state"] == "serving", otherwise=server.state)
    told = server.admin.get("/weights").json()["history"][0]
    assert (told["outcome"], told["request_id"]) == ("aborted", update.request_id)
    assert "no commit came within 1.5 s" in told["error"]["detail"]
    _serves(server, OLD)


@on(DENSE_TP2)
def test_a_commit_needs_no_trainer(
    served: Served, trainer: TrainerProcess, update: TwoPhase
) -> None:
    """Every byte is in the engine by then; unless the watcher looks just now, and gives it up."""
    update.plan_id = trainer.connect(served.server.admin)
    assert update.prepare().status_code == 200
    trainer.signal(signal.SIGKILL)
    committed = update.commit()
    if committed.status_code == 503:
        assert "while the update was prepared" in problem(committed, 503, "peer_lost")
        _serves(served.server, OLD)
    else:
        assert committed.status_code == 200, committed.text
        _serves(served.server, NEW)


@on(DENSE_TP2)
def test_a_commit_that_fails_on_one_rank_fences(
    served: Served, update: TwoPhase, steps: Steps
) -> None:
    """Half-new weights never serve; the next update mends it."""
    assert update.prepare().status_code == 200
    steps.fail(rank=1, module=3)
    detail = problem(update.commit(), 500, "engine_call_failed")
    assert problem(update.commit(), 500, "engine_call_failed") == detail
    assert served.server.state()["state"] == "fenced"
    assert served.server.complete(OLD.prompts()[0]).status_code == 503
    served.install(NEW)
    _serves(served.server, NEW)


@on(DENSE, DENSE_TP2)
def test_two_engines_take_a_version_together_or_not_at_all(served: Served, tmp_path: Path) -> None:
    """One is ahead and refuses: the other had prepared, and goes on with its old weights."""
    served.restore(OLD)
    with in_memory_server(OLD.copy_to(tmp_path / "model"), tmp_path / "other.log") as other:
        engines, version = [served.server.url, other.url], served.next_version()
        with WeightSender.from_hf(
            NEW.tensors(), engines=engines, token=TOKEN, config=NEW.config(), two_phase=True
        ) as sender:
            with WeightSender.from_hf(
                OLD.tensors(), engines=other.url, token=TOKEN, config=OLD.config()
            ) as ahead:
                ahead.update(version + 1)
            with pytest.raises(EnginesFailedError) as caught:
                sender.update(version)
            failures = caught.value.failures
            assert failures[other.url].code == "stale_version"
            assert f"version {version + 1}, serving" in failures[other.url].holds
            assert failures[served.server.url].code == "update_aborted"
            assert other.url in failures[served.server.url].detail
            for server in (served.server, other):
                assert server.state()["state"] == "serving"
                _serves(server, OLD)
            sender.update(version + 2)
            for server in (served.server, other):
                assert server.state()["weights"]["version"] == version + 2
                _serves(server, NEW)
