"""Two API processes are one server: whichever answers, it knows what the other was told."""

from __future__ import annotations

import pytest

from tests.support.configurations import DENSE_TP2, NEW, OLD, on
from tests.support.engine_server import EngineServer
from tests.support.problems import problem
from tests.support.served import Served

pytestmark = on(DENSE_TP2)

CALLS = 12
"""Enough for both to be asked."""


@pytest.fixture(autouse=True)
def old_weights(served: Served) -> None:
    """Every test begins with the old weights serving."""
    served.restore(OLD)


def test_both_say_the_same_of_the_engine(server: EngineServer) -> None:
    """One engine, one state, and no trace of who answers."""
    seen = {tuple(sorted(server.state()["engine"].items())) for _ in range(CALLS)}
    assert len(seen) == 1


def test_a_pause_of_one_is_a_pause_of_both(server: EngineServer) -> None:
    """Either refuses another mode, takes the same one, and resumes."""
    for _ in range(4):
        server.admin.post("/pause", json={"mode": "keep"}).raise_for_status()
        for _ in range(CALLS):
            assert server.state()["state"] == "paused"
            refused = server.admin.post("/pause", json={"mode": "abort"})
            problem(refused, 409, "illegal_state")
        server.admin.post("/resume").raise_for_status()
        assert {server.state()["state"] for _ in range(CALLS)} == {"serving"}


def test_sources_plans_and_answers_are_known_to_both(served: Served) -> None:
    """Each call may meet another process; ten updates with a call each never miss."""
    server, offer = served.server, served.offer(NEW)
    for _ in range(10):
        version = served.next_version()
        done = offer.update(version, request_id=f"repeat-{version}")
        assert done.status_code == 200, done.text
        plan = done.json()["plan_id"]
        again = [
            offer.update_from(plan, version, request_id=f"repeat-{version}").json()
            for _ in range(4)
        ]
        assert again == [done.json()] * 4
        assert {server.state()["weights"]["version"] for _ in range(6)} == {version}
    assert NEW.wrong_answers(server.greedy) == []
