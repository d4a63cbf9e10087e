"""Pause keep, wait and abort with requests in flight; what comes in meanwhile is queued."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.configurations import DENSE, OLD, on
from tests.support.engine_server import EngineServer
from tests.support.hf_reference import greedy, reference_model
from tests.support.problems import problem
from tests.support.served import Served
from tests.support.streams import Stream
from tests.support.waiting import until

pytestmark = on(DENSE)

PROMPT = OLD.prompts()[0]


@pytest.fixture(autouse=True)
def serving(served: Served) -> Iterator[None]:
    """Every test begins with the old weights, and ends with an engine that serves and is idle."""
    served.restore(OLD)
    yield
    assert served.server.admin.post("/resume").status_code == 200
    assert served.server.greedy(PROMPT) == OLD.expected()[0]
    idle = {"running": 0, "waiting": 0}
    until(lambda: served.server.state()["requests"] == idle, otherwise=served.server.state)


def _pause(server: EngineServer, mode: str) -> None:
    server.admin.post("/pause", json={"mode": mode, "timeout_s": 60}).raise_for_status()
    assert server.state()["state"] == "paused"


def test_keep_freezes_requests_and_they_go_on_as_if_nothing_had_been(
    server: EngineServer, background: ThreadPoolExecutor
) -> None:
    """No token while paused; afterwards the tokens of an undisturbed request, streamed or not."""
    stream = Stream(server, PROMPT, 150)
    whole = background.submit(server.complete, PROMPT, 150)
    stream.wait_for(20)
    until(lambda: server.state()["requests"]["running"] == 2, otherwise=server.state)
    _pause(server, "keep")
    time.sleep(0.5)  # what the engine had said by then is still on its way
    so_far = len(stream.ids)
    time.sleep(0.5)
    assert len(stream.ids) == so_far < 150
    assert not whole.done()
    server.admin.post("/resume").raise_for_status()
    expected = greedy(reference_model(OLD.folder), PROMPT, 150)
    assert stream.result() == expected
    assert server.tokens_of(whole.result(60)) == expected
    assert (stream.finish_reason, server.finish_reason(whole.result())) == ("length", "length")


def test_abort_gives_clients_what_there_is_and_says_so(
    server: EngineServer, background: ThreadPoolExecutor
) -> None:
    """Requests end with finish reason abort and their tokens so far, streamed or not."""
    stream = Stream(server, PROMPT, 250)
    whole = background.submit(server.complete, PROMPT, 250)
    stream.wait_for(10)
    _pause(server, "abort")
    ids = stream.result()
    assert stream.finish_reason == "abort"
    expected = greedy(reference_model(OLD.folder), PROMPT, len(ids))
    assert 10 <= len(ids) < 250
    assert ids == expected
    assert server.finish_reason(whole.result(30)) == "abort"


def test_wait_lets_requests_finish_first(server: EngineServer) -> None:
    """Pause(wait) returns when the stream has ended by itself."""
    stream = Stream(server, PROMPT, 120)
    stream.wait_for(5)
    _pause(server, "wait")
    assert stream.result() == greedy(reference_model(OLD.folder), PROMPT, 120)
    assert stream.finish_reason == "length"


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_requests_of_a_pause_are_queued_and_answered_after_it(
    server: EngineServer, background: ThreadPoolExecutor, mode: str
) -> None:
    """None is refused, dropped or answered early, whatever the mode; also a stream."""
    _pause(server, mode)
    queued = background.submit(server.complete, PROMPT)
    stream = Stream(server, PROMPT, 16)
    time.sleep(0.7)
    assert not queued.done()
    assert stream.ids == []
    server.admin.post("/resume").raise_for_status()
    assert server.tokens_of(queued.result(30)) == OLD.expected()[0]
    assert stream.result() == OLD.expected()[0]


def test_a_wait_that_takes_too_long_is_504_and_the_engine_serves_on(server: EngineServer) -> None:
    """The former state comes back; the stream is not hurt; a later pause works."""
    stream = Stream(server, PROMPT, 300)
    stream.wait_for(5)
    late = server.admin.post("/pause", json={"mode": "wait", "timeout_s": 0.2})
    assert "0.2 s" in problem(late, 504, "pause_timeout")
    assert late.json()["state"] == server.state()["state"] == "serving"
    assert server.greedy(PROMPT) == OLD.expected()[0]
    assert len(stream.result()) == 300
    _pause(server, "wait")


def test_a_flush_within_a_pause_hurts_no_held_request(server: EngineServer) -> None:
    """A held stream computes its KV anew and goes on with the same tokens."""
    stream = Stream(server, PROMPT, 120)
    stream.wait_for(20)
    _pause(server, "keep")
    server.admin.post("/flush").raise_for_status()
    server.admin.post("/resume").raise_for_status()
    assert stream.result() == greedy(reference_model(OLD.folder), PROMPT, 120)


def test_a_repeated_wait_holds_new_requests_as_the_first_one_did(
    server: EngineServer, background: ThreadPoolExecutor
) -> None:
    """Under steady traffic: a pause that was given up takes nothing from the next one."""
    stream = Stream(server, PROMPT, 300)
    stream.wait_for(5)
    late = server.admin.post("/pause", json={"mode": "wait", "timeout_s": 0.2})
    problem(late, 504, "pause_timeout")
    done = threading.Event()

    def traffic() -> None:
        while not done.is_set():
            server.complete(PROMPT, 40)

    clients = [background.submit(traffic) for _ in range(3)]
    try:
        _pause(server, "wait")
        assert len(stream.result()) == 300, "it ended before the pause took effect"
    finally:
        done.set()
        server.admin.post("/resume").raise_for_status()
    for client in clients:
        client.result(30)


def test_a_pause_that_is_given_up_at_any_moment_leaves_the_engine_serving(
    server: EngineServer,
) -> None:
    """Also just as the last request ends, when the engine is about to stand still."""
    began = time.monotonic()
    Stream(server, PROMPT, 40).result()
    lasts = time.monotonic() - began
    for part in (0.5, 0.8, 0.95, 1.0, 1.1):
        stream = Stream(server, PROMPT, 40)
        stream.wait_for(1)
        asked = {"mode": "wait", "timeout_s": max(part * lasts, 0.01)}
        paused = server.admin.post("/pause", json=asked)
        assert len(stream.result()) == 40
        time.sleep(0.2)  # what is late would take effect by then
        state = server.state()["state"]
        assert state == ("paused" if paused.status_code == 200 else "serving")
        if state == "paused":
            server.admin.post("/resume").raise_for_status()
        assert server.greedy(PROMPT) == OLD.expected()[0]


def test_only_a_resume_ends_a_pause_without_an_end(server: EngineServer) -> None:
    """Another caller's `hold_s` runs beside it."""
    _pause(server, "keep")
    held = server.admin.post("/pause", json={"mode": "keep", "hold_s": 0.2})
    assert held.json()["pause"] == {"mode": "keep", "until": None}
    time.sleep(0.6)
    assert server.state()["state"] == "paused"
    server.admin.post("/resume").raise_for_status()
    assert server.greedy(PROMPT) == OLD.expected()[0]
