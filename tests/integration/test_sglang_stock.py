"""SGLang as it comes, without a flag of ours.

It is the real thing and says what HF transformers says; we leave it alone; and it dies of what it
would not die of with us.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sglang_ext.versions import SGLANG
from tests.support.configurations import OLD
from tests.support.engine_server import StreamEvent
from tests.support.looked_into import FOLDER, look_into
from tests.support.sglang_server import SglangServer, sglang_server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server has its files."""
    return tmp_path_factory.mktemp("stock")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[SglangServer]:
    """A server that the last of the tests below ends."""
    with sglang_server(
        OLD.copy_to(folder / "model"),
        folder / "log",
        launcher="tests.support.looked_into_sglang",
        environment={FOLDER: str(folder), "ENGINE_PLUGINS_STALL_TIMEOUT_S": "7"},
        preload=True,
    ) as server:
        yield server


def test_greedy_tokens_are_those_of_hf_transformers(server: SglangServer) -> None:
    assert OLD.wrong_answers(server.greedy) == []


def test_a_stream_tells_every_token_once(server: SglangServer) -> None:
    events = list(server.stream(OLD.prompts()[0], 16))
    assert [token for event in events for token in event.token_ids] == OLD.expected()[0]
    assert [event.finish_reason for event in events if event.finish_reason] == ["length"]


def test_an_aborted_stream_says_so(server: SglangServer) -> None:
    """SGLang's own abort, in the middle of a request."""
    events: list[StreamEvent] = []
    begun = threading.Event()

    def follow() -> None:
        for event in server.stream([5, 6, 7], 450):
            events.append(event)
            begun.set()

    follower = threading.Thread(target=follow)
    follower.start()
    assert begun.wait(30)
    server.http.post("/abort_request", json={"abort_all": True}).raise_for_status()
    follower.join(30)
    assert events[-1].finish_reason == "abort"
    assert 0 < sum(len(event.token_ids) for event in events) < 450


def test_a_refused_request_ended_by_an_error(server: SglangServer) -> None:
    refused = server.complete(range(2, 300), tokens=2048)
    assert refused.status_code == 400
    assert server.finish_reason(refused) == "error"


def test_a_server_without_a_flag_of_ours_is_stock(server: SglangServer, folder: Path) -> None:
    """No routes and no state; and an unmatched resume of its own ends it.

    Ours answers an unmatched resume with the state, see tests/contract/test_states.py.
    """
    assert httpx.get(f"{server.url}/admin/v1/state").status_code == 404
    assert not list(folder.glob("engine-plugins-*")), "a runtime directory"
    told = look_into(server.pid, folder, sorted(SGLANG.hooked))
    assert len(told) >= 3, "an API process, a scheduler and a detokenizer"
    assert all(each == {"modules": [], "hooked": []} for each in told.values()), told
    assert OLD.wrong_answers(server.greedy) == []
    with contextlib.suppress(httpx.TransportError):
        server.http.post("/resume_memory_occupation", json={}, timeout=5)
    assert has_ended(server.pid, within_s=60)
    assert "Scheduler hit an exception" in server.log_tail(200)


def has_ended(pid: int, within_s: float) -> bool:
    """Whether a child of ours is gone in time."""
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(0.1)
    return False
