"""An engine's own routes that would move it behind the admin state: closed in every state."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import httpx
import pytest

from tests.support.configurations import DENSE, DENSE_TP2, NEW, OLD, on
from tests.support.engines import only, real_engines_here
from tests.support.served import Served
from tests.support.stepping import Steps
from tests.support.waiting import until

pytestmark = only(*real_engines_here())

CALLS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "vllm": [
        ("/pause?mode=keep", {}),
        ("/resume", {}),
        ("/sleep?level=2", {}),
        ("/wake_up", {}),
        ("/collective_rpc", {"method": "reload_weights"}),
        ("/collective_rpc", {"method": "engine_plugins_call"}),
        ("/update_weight_version", {"new_version": "9999"}),
        ("/weight_checker", {"action": "reset"}),
        ("/scale_elastic_ep", {"new_data_parallel_size": 2}),
    ],
    "sglang": [
        ("/pause_generation", {"mode": "retract"}),
        ("/continue_generation", {}),
        ("/update_weight_version", {"new_version": "9999"}),
        ("/update_weights_from_disk", {"model_path": "MODEL"}),
        ("/begin_weight_update", {}),
        ("/release_memory_occupation", {}),
        ("/resume_memory_occupation", {}),
        ("/slow_down", {"forward_sleep_time": 100.0}),
        (
            "/init_weights_update_group",
            {
                "master_address": "127.0.0.1",
                "master_port": 1,
                "rank_offset": 1,
                "world_size": 2,
                "group_name": "g",
            },
        ),
    ],
}
"""What moved the engines before these routes were closed."""


@pytest.fixture(autouse=True)
def right_answers(served: Served) -> Iterator[None]:
    """Every test begins with the old weights and ends with right answers."""
    served.restore(OLD)
    yield
    served.restore(OLD)
    assert OLD.wrong_answers(served.server.greedy) == []


def chief_of(served: Served) -> httpx.Client:
    """Somebody with the highest of the engine's own keys; any API process may answer a call."""
    key = served.engine.keyed.get("admin_api_key") or served.engine.keyed["api_key"]
    return httpx.Client(
        base_url=served.server.url,
        headers={"authorization": f"Bearer {key}"},
        limits=httpx.Limits(max_keepalive_connections=0),
        timeout=10,
    )


def call_all(served: Served) -> None:
    """Call each of them, whole and with all that the table names; nothing moves."""
    server = served.server
    table = import_module(f"{server.kind}_ext.closed_routes").INSTEAD
    before = server.state()
    rest: list[tuple[str, dict[str, Any]]] = [(path, {}) for path in table]
    with chief_of(served) as chief:
        for path, body in CALLS[server.kind] + rest:
            answer = chief.post(path, json=body)
            assert answer.status_code == 409, (path, answer.text)
            assert answer.json()["code"] == "closed_route"
            assert answer.json()["remedy"] == table[path.split("?")[0]]
    after = server.state()
    assert {**after, "requests": None} == {**before, "requests": None}


@on(DENSE)
def test_while_it_serves_is_paused_and_sleeps(served: Served) -> None:
    """A sleeping engine is not woken behind our back, nor a paused one resumed."""
    admin = served.server.admin
    call_all(served)
    admin.post("/pause").raise_for_status()
    call_all(served)
    admin.post("/resume").raise_for_status()
    admin.post("/sleep", json={"level": 2}).raise_for_status()
    call_all(served)


@on(DENSE_TP2)
def test_while_it_updates_and_is_fenced(
    served: Served, steps: Steps, background: ThreadPoolExecutor
) -> None:
    """Half-new weights do not generate, and nothing but an update opens a fence."""
    held = steps.hold(rank=0, module=12)
    steps.fail(rank=1, module=13)
    update = background.submit(served.install, NEW)
    until(lambda: _phase(served) == "install", otherwise=served.server.state)
    _settled(served)
    call_all(served)
    held.unlink()
    with pytest.raises(AssertionError, match="told to fail"):
        update.result(60)
    assert served.server.state()["state"] == "fenced"
    call_all(served)


@on(DENSE)
def test_flushing_and_ending_requests_stay_open(served: Served) -> None:
    """Trainers call them, and they take nothing from the state."""
    calls: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "vllm": [("/reset_prefix_cache", {}), ("/abort_requests", {"request_ids": ["none"]})],
        "sglang": [("/flush_cache", {}), ("/abort_request", {"rid": "none"})],
    }
    with chief_of(served) as chief:
        for path, body in calls[served.server.kind]:
            answer = chief.post(path, json=body)
            assert answer.status_code == 200, (path, answer.text)


def _phase(served: Served) -> str | None:
    update = served.server.state()["update"]
    return None if update is None else update["phase"]


def _settled(served: Served) -> None:
    """Until the held update makes no more progress."""
    states = [served.server.state()]

    def stands_still() -> bool:
        states.append(served.server.state())
        return states[-1] == states[-2]

    until(stands_still, otherwise=served.server.state)
