"""What becomes of requests over an update: none is dropped, none meets KV of older weights."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from tests.integration.conftest import StartServer
from tests.support.hf_reference import cache_of, continue_greedy, greedy, reference_model
from tests.support.live_models import LiveModel
from tests.support.offers import Offer, offered
from tests.support.vllm_server import VllmServer

pytestmark = pytest.mark.engine

OLD, NEW = LiveModel(kind="qwen3_live", version=0), LiveModel(kind="qwen3_live", version=1)
PROMPT = OLD.prompts()[0]
LONG_PREFIX = [2 + (7 * index) % 300 for index in range(200)]
"""Several KV blocks that requests share."""


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Iterator[VllmServer]:
    """One server for the module, started on the old weights."""
    with start_server(OLD) as running:
        yield running


@pytest.fixture(scope="module")
def offers(server: VllmServer) -> Iterator[dict[LiveModel, Offer]]:
    """Both versions, registered in this process."""
    with ExitStack() as stack:
        yield {
            model: stack.enter_context(offered(server.admin, model.tensors()))
            for model in (OLD, NEW)
        }


@pytest.fixture(autouse=True)
def old_weights(server: VllmServer, offers: dict[LiveModel, Offer]) -> None:
    """Every test begins with the old weights serving."""
    _install(server, offers[OLD])


class Stream(threading.Thread):
    """A long streaming request in flight."""

    def __init__(self, server: VllmServer, prompt: list[int], tokens: int) -> None:
        super().__init__(daemon=True)
        self._server, self._prompt, self._wanted = server, prompt, tokens
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            for event in self._server.stream(self._prompt, self._wanted):
                self.ids += event.token_ids
                self.finish_reason = event.finish_reason or self.finish_reason
        except Exception as error:  # shown by the test's own thread
            self.error = error

    def wait_for(self, tokens: int) -> None:
        """Wait until so many tokens have come."""
        deadline = time.monotonic() + 30
        while len(self.ids) < tokens and self.error is None:
            assert time.monotonic() < deadline, f"only {len(self.ids)} tokens came"
            time.sleep(0.002)

    def result(self) -> list[int]:
        """All ids, once the stream has ended."""
        self.join(60)
        assert not self.is_alive(), "the stream hangs"
        if self.error is not None:
            raise self.error
        return self.ids


def _install(server: VllmServer, offer: Offer, **options: Any) -> dict[str, Any]:
    version = (server.state()["weights"]["version"] or 0) + 1
    response = offer.update(version, **options)
    assert response.status_code == 200, response.text
    return dict(response.json())


def _switch_points(ids: list[int], prompt: list[int]) -> list[int]:
    """Lengths at which the stream may have changed over: what comes before is the old model's."""
    old = greedy(reference_model(OLD.folder), prompt, len(ids))
    same = next((at for at, (a, b) in enumerate(zip(ids, old, strict=True)) if a != b), len(ids))
    return list(range(1, same + 1))


def test_a_held_stream_completes_and_recomputes_its_kv_by_default(
    server: VllmServer, offers: dict[LiveModel, Offer]
) -> None:
    """Pause(keep), update, resume: the stream goes on as the new model would from its text."""
    stream = Stream(server, PROMPT, 300)
    stream.wait_for(20)
    assert server.admin.post("/pause", json={"mode": "keep"}).status_code == 200
    report = _install(server, offers[NEW])
    assert server.state()["state"] == "paused", "only its caller ends a pause"
    assert server.admin.post("/resume").status_code == 200
    ids = stream.result()
    assert len(ids) == 300
    assert stream.finish_reason == "length"
    assert report["outcome"] == "installed"
    new = reference_model(NEW.folder)

    def recomputed(at: int, tokens: int) -> bool:
        return greedy(new, [*PROMPT, *ids[:at]], tokens) == ids[at : at + tokens]

    points = [at for at in _switch_points(ids, PROMPT) if at >= 20 and recomputed(at, 4)]
    assert any(recomputed(at, len(ids) - at) for at in points), (
        "the rest of the stream is not what the new weights say of the whole text"
    )


def test_a_held_stream_keeps_its_old_kv_when_asked(
    server: VllmServer, offers: dict[LiveModel, Offer]
) -> None:
    """in_flight_kv keep: the new weights go on over KV of the old ones; others see none of it."""
    stream = Stream(server, [*LONG_PREFIX, *PROMPT], 120)
    stream.wait_for(10)
    _install(server, offers[NEW], in_flight_kv="keep")
    prompt = [*LONG_PREFIX, 5, 6, 7]
    new = reference_model(NEW.folder)
    assert server.greedy(prompt) == greedy(new, prompt, 16), "a new request met old KV"
    ids = stream.result()
    assert len(ids) == 120
    whole = [*LONG_PREFIX, *PROMPT]
    old = reference_model(OLD.folder)
    points = [at for at in _switch_points(ids, whole) if at >= 10]
    assert any(
        continue_greedy(new, cache_of(old, [*whole, *ids[: at - 1]]), [ids[at - 1]], len(ids) - at)
        == ids[at:]
        for at in reversed(points)
    ), "the rest of the stream is not the new weights over the old KV"


@pytest.mark.parametrize("in_flight_kv", ["recompute", "keep"])
@pytest.mark.parametrize("flush", [True, False])
def test_no_new_answer_uses_kv_of_the_old_weights(
    server: VllmServer, offers: dict[LiveModel, Offer], in_flight_kv: str, flush: bool
) -> None:
    """A prefix that the old weights cached is computed anew for requests after the update."""
    prompt = [*LONG_PREFIX, *PROMPT]
    old, new = reference_model(OLD.folder), reference_model(NEW.folder)
    assert server.greedy(prompt) == greedy(old, prompt, 16)
    assert server.greedy(prompt) == greedy(old, prompt, 16), "and again, from the cache"
    _install(server, offers[NEW], in_flight_kv=in_flight_kv, flush=flush)
    assert server.greedy(prompt) == greedy(new, prompt, 16)
    _install(server, offers[OLD], in_flight_kv=in_flight_kv, flush=flush)
    assert server.greedy(prompt) == greedy(old, prompt, 16)


def test_a_request_queued_during_the_pause_is_answered_by_the_new_weights(
    server: VllmServer, offers: dict[LiveModel, Offer]
) -> None:
    """It arrives while paused, shares a cached prefix, and must still see only new KV."""
    prompt = [*LONG_PREFIX, 9, 9, 9]
    server.greedy(prompt)
    server.admin.post("/pause", json={"mode": "keep"}).raise_for_status()
    queued = Stream(server, prompt, 16)
    deadline = time.monotonic() + 10
    while server.state()["requests"]["waiting"] != 1:
        assert time.monotonic() < deadline, "the request never reached the queue"
        time.sleep(0.01)
    _install(server, offers[NEW], in_flight_kv="keep", resume=True)
    assert queued.result() == greedy(reference_model(NEW.folder), prompt, 16)


def test_abort_gives_its_client_what_there_is_and_says_so(server: VllmServer) -> None:
    """Pause(abort) ends a stream with finish_reason abort and its tokens so far."""
    stream = Stream(server, PROMPT, 400)
    stream.wait_for(10)
    server.admin.post("/pause", json={"mode": "abort"}).raise_for_status()
    ids = stream.result()
    assert stream.finish_reason == "abort"
    assert 10 <= len(ids) < 400
    server.admin.post("/resume").raise_for_status()


def test_wait_lets_requests_finish_first(server: VllmServer) -> None:
    """Pause(wait) returns when the stream has ended by itself."""
    stream = Stream(server, PROMPT, 200)
    stream.wait_for(5)
    server.admin.post("/pause", json={"mode": "wait", "timeout_s": 60}).raise_for_status()
    ids = stream.result()
    assert (len(ids), stream.finish_reason) == (200, "length")
    assert server.state()["state"] == "paused"
    server.admin.post("/resume").raise_for_status()


def test_a_wait_that_takes_too_long_is_504_and_the_engine_serves_on(server: VllmServer) -> None:
    """The former state comes back; the stream is not hurt; a later pause works."""
    stream = Stream(server, PROMPT, 450)
    stream.wait_for(5)
    late = server.admin.post("/pause", json={"mode": "wait", "timeout_s": 0.2})
    assert late.status_code == 504
    assert late.json()["code"] == "pause_timeout"
    assert server.state()["state"] == "serving"
    assert server.greedy(PROMPT) == OLD.expected()[0]
    assert len(stream.result()) == 450
    server.admin.post("/pause", json={"mode": "wait"}).raise_for_status()
    server.admin.post("/resume").raise_for_status()


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_an_update_under_load_loses_no_request(
    server: VllmServer, offers: dict[LiveModel, Offer], mode: str
) -> None:
    """Streams before, during and after an update all end as their pause mode says."""
    streams = [Stream(server, [*PROMPT, extra], 100) for extra in range(2, 8)]
    for stream in streams:
        stream.wait_for(1)
    _install(server, offers[NEW], pause=mode)
    assert NEW.wrong_answers(server.greedy) == []
    for stream in streams:
        ids = stream.result()
        if mode == "abort":
            assert stream.finish_reason in ("abort", "length")
        else:
            assert (len(ids), stream.finish_reason) == (100, "length")


def test_a_pause_with_hold_ends_by_itself(server: VllmServer) -> None:
    """hold_s: a caller that vanished does not leave the engine paused for ever."""
    server.admin.post("/pause", json={"hold_s": 0.5}).raise_for_status()
    assert server.state()["pause"]["until"] is not None
    deadline = time.monotonic() + 10
    while server.state()["state"] != "serving":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.greedy(PROMPT) == OLD.expected()[0]


def test_flush_works_while_paused_and_while_serving(server: VllmServer) -> None:
    """And says which caches it emptied; answers stay right."""
    both = {"flushed": ["prefix_cache", "multimodal_cache"]}
    assert server.admin.post("/flush").json() == both
    server.admin.post("/pause").raise_for_status()
    assert server.admin.post("/flush").json() == both
    only = server.admin.post("/flush", json={"multimodal_cache": False})
    assert only.json() == {"flushed": ["prefix_cache"]}
    server.admin.post("/resume").raise_for_status()
    assert server.greedy(PROMPT) == OLD.expected()[0]


def test_sources_outlive_what_their_trainer_forgets(server: VllmServer) -> None:
    """Copies of tensors that cannot be read in place live as long as the offer does.

    Everything that can be freed is freed and written over with NaN, and pulled twice.
    """
    scattered = {
        name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor.clone()
        for name, tensor in NEW.tensors().items()
    }
    assert not scattered["lm_head.weight"].is_contiguous()
    with offered(server.admin, scattered) as offer:
        assert offer.source.copied_bytes > 0
        sizes = [tensor.shape for tensor in scattered.values()]
        del scattered
        for _ in range(2):
            gc.collect()
            junk = [torch.full(size, float("nan")) for size in sizes * 3]
            _install(server, offer)
            assert NEW.wrong_answers(server.greedy) == []
            del junk
