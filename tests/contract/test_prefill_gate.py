"""The prefill gate of every engine: told, changed and held to over HTTP, and never latched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from engine_plugins.admin_client import AdminClient
from engine_plugins.errors import AdminAnswerError
from engine_plugins.prefill_gate.decision import OUTCOMES
from tests.support.configurations import DENSE, DENSE_TP2, OLD, on
from tests.support.engine_server import TOKEN, EngineServer
from tests.support.problems import problem
from tests.support.served import Served
from tests.support.streams import Stream
from tests.support.waiting import until

pytestmark = on(DENSE, DENSE_TP2)

ROUTE = "/prefill-gate"
DEFAULTS = {
    "mode": "off",
    "cap_bytes": None,
    "margin_quantile": 0.99,
    "margin_bytes": 256 << 20,
}
NO_ROOM = 1
"""A cap under what any engine holds."""
PROMPT = OLD.prompts()[0]


@pytest.fixture
def server(served: Served) -> Iterator[EngineServer]:
    """The old weights serve; the gate is off, and has counted nothing."""
    served.restore(OLD)
    put_back(served.server)
    yield served.server
    put_back(served.server)
    assert served.server.greedy(PROMPT) == OLD.expected()[0]


def put_back(server: EngineServer) -> None:
    """The gate as the server was started."""
    change(server, **DEFAULTS)
    server.admin.post(ROUTE + "/reset").raise_for_status()


def change(server: EngineServer, **changes: object) -> dict[str, Any]:
    """Change the gate; what it then says."""
    answer = server.admin.patch(ROUTE, json=changes)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def told(server: EngineServer) -> dict[str, Any]:
    """What the gate says."""
    answer = server.admin.get(ROUTE)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refused(answer: httpx.Response) -> None:
    """A status of its own, which no stream had opened before, and words about memory."""
    assert answer.status_code == 413, answer.text
    assert "text/event-stream" not in answer.headers["content-type"]
    assert "MiB" in answer.text or "can never run here" in answer.text


def test_it_is_off_and_says_all_that_is_known(server: EngineServer) -> None:
    """Settings, memory, calibration by phase, counters."""
    assert server.greedy(PROMPT) == OLD.expected()[0]
    gate = told(server)
    assert gate["settings"] == DEFAULTS
    assert gate["decisions"] == dict.fromkeys(OUTCOMES, 0), "one that is off judges nothing"
    assert set(gate["calibration"]) == {"layers", "sampling", "prompt_logprobs", "encoder"}
    assert (gate["waiting"], gate["deferred_s"], gate["exceeded"], gate["recent"]) == (0, 0, 0, [])


def test_each_setting_is_changed_by_itself(server: EngineServer) -> None:
    """Whichever API process is asked afterwards; null is what is free."""
    for name, value in (
        ("mode", "observe"),
        ("cap_bytes", 1 << 30),
        ("margin_quantile", 0.5),
        ("margin_bytes", 0),
    ):
        expected = {**told(server)["settings"], name: value}
        assert change(server, **{name: value})["settings"] == expected
        assert [told(server)["settings"] for _ in range(4)] == [expected] * 4
    assert change(server, cap_bytes=None)["settings"]["cap_bytes"] is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "on"},
        {"cap_bytes": 0},
        {"cap_bytes": 1 << 52},
        {"margin_quantile": 0.0},
        {"margin_bytes": -1},
        {"mode": "enforce", "margin_quantile": 2},
    ],
    ids=["mode", "no-cap", "above-the-machine", "quantile", "margin", "one-of-two"],
)
def test_a_value_that_makes_no_sense_changes_nothing(
    server: EngineServer, wrong: dict[str, Any]
) -> None:
    """422, which names the setting."""
    assert "PREFILL_" in problem(server.admin.patch(ROUTE, json=wrong), 422, "refused_setting")
    assert told(server)["settings"] == DEFAULTS


def test_bodies_that_are_no_change(server: EngineServer) -> None:
    """400, as on every route."""
    bodies: list[Any] = [{"modus": "off"}, {"mode": None}, {"margin_bytes": "1"}, []]
    for body in bodies:
        problem(server.admin.patch(ROUTE, json=body), 400, "malformed_request")
    assert told(server)["settings"] == DEFAULTS


def test_a_gate_that_observes_refuses_nothing(server: EngineServer) -> None:
    """Without any room; what it would have done is counted."""
    change(server, mode="observe", cap_bytes=NO_ROOM)
    assert OLD.wrong_answers(server.greedy) == []
    assert server.oversized().status_code == 200
    decisions = told(server)["decisions"]
    assert sum(decisions.values()) >= len(OLD.prompts())
    assert decisions["too_large"] >= 1, "it would have refused what fits nowhere"


def test_without_room_an_idle_engine_runs_what_is_small_and_refuses_the_rest(
    server: EngineServer,
) -> None:
    """Again and again, and as before once there is room: nothing latches."""
    server.admin.post("/flush").raise_for_status()  # of a prompt in the cache little is missing
    change(server, mode="enforce", cap_bytes=NO_ROOM)
    for _ in range(2):
        assert OLD.wrong_answers(server.greedy, at_once=False) == []
        refused(server.oversized())
        refused(server.oversized(stream=True))
    change(server, cap_bytes=None)
    assert OLD.wrong_answers(server.greedy) == []
    change(server, mode="off")
    assert OLD.wrong_answers(server.greedy) == []
    assert server.oversized().status_code == 200


def test_what_finds_no_room_beside_others_waits_for_them(server: EngineServer) -> None:
    """Those that run are left alone, and the engine is healthy all the while."""
    alone = Stream(server, PROMPT, 100).result()
    server.admin.post("/flush").raise_for_status()
    change(server, mode="enforce", cap_bytes=NO_ROOM)
    running = Stream(server, PROMPT, 100)
    running.wait_for(5)
    waiting = Stream(server, OLD.prompts()[1], 16)
    assert server.http.get("/health").status_code == 200
    assert waiting.result() == OLD.expected()[1]
    assert running.result() == alone
    gate = told(server)
    assert gate["decisions"]["defer"] >= 1
    assert gate["decisions"]["too_large"] == gate["decisions"]["pressure"] == 0
    assert gate["waiting"] == 0


def test_a_paused_engine_can_be_told(server: EngineServer) -> None:
    """A request that it holds is judged by what is in force when it runs."""
    server.admin.post("/pause").raise_for_status()
    held = Stream(server, PROMPT, 16)
    assert change(server, mode="enforce")["settings"]["mode"] == "enforce"
    assert sum(told(server)["decisions"].values()) == 0
    server.admin.post("/resume").raise_for_status()
    assert held.result() == OLD.expected()[0]
    assert told(server)["decisions"]["run"] >= 1


def test_a_reset_counts_from_0_and_keeps_the_settings(server: EngineServer) -> None:
    """What was measured is forgotten too."""
    change(server, mode="observe")
    assert OLD.wrong_answers(server.greedy) == []
    assert told(server)["decisions"]["run"] >= 1
    empty = server.admin.post(ROUTE + "/reset").json()
    assert sum(empty["decisions"].values()) == 0
    assert empty["recent"] == []
    assert {line["samples"] for line in empty["calibration"].values()} == {0}
    assert empty["settings"]["mode"] == "observe"


def test_the_client_is_typed(server: EngineServer) -> None:
    """The same calls from Python."""
    with AdminClient(server.url, token=TOKEN) as client:
        assert client.prefill_gate().settings.mode == "off"
        changed = client.set_prefill_gate(mode="observe", margin_bytes=5)
        assert (changed.settings.mode, changed.settings.margin_bytes) == ("observe", 5)
        assert client.reset_prefill_gate().settings == changed.settings
        with pytest.raises(AdminAnswerError, match="422 refused_setting"):
            client.set_prefill_gate(mode="never")


def test_the_engines_own_metrics_have_the_gates_series(server: EngineServer) -> None:
    """Each count once, whichever API processes tell it and whichever is asked."""
    shows(server, "off")
    change(server, mode="observe")
    shows(server, "observe")  # so whoever tells has also seen that the counts began anew
    before = series(server)
    for _ in range(6):
        assert OLD.wrong_answers(server.greedy) == []
    counted = told(server)["decisions"]["run"]
    assert counted >= 6

    def grown() -> float:
        return series(server)['decisions_total{outcome="run"}'] - before.get(
            'decisions_total{outcome="run"}', 0
        )

    until(lambda: grown() == counted, otherwise=lambda: f"{grown()} instead of {counted}")
    assert [grown() for _ in range(6)] == [counted] * 6
    now = series(server)
    assert now['mode{mode="observe"}'] == 1
    assert now['mode{mode="off"}'] == 0
    assert now["used_bytes"] > 0
    assert {'prediction_error_ratio{regime="layers"}', "deferred_seconds_total"} <= now.keys()


def shows(server: EngineServer, mode: str) -> None:
    """Wait until the series say that the gate is in a mode; they are told once a second."""
    name = f'mode{{mode="{mode}"}}'
    until(lambda: series(server).get(name) == 1, otherwise=lambda: series(server))


def series(server: EngineServer) -> dict[str, float]:
    """The gate's lines of a scrape."""
    answer = server.http.get("/metrics", follow_redirects=True)
    assert answer.status_code == 200, answer.text
    name = "engine_plugins_prefill_gate_"
    lines = [line.rsplit(" ", 1) for line in answer.text.splitlines() if line.startswith(name)]
    assert len({each for each, _ in lines}) == len(lines), "a series is there twice"
    return {each.removeprefix(name): float(value) for each, value in lines}
