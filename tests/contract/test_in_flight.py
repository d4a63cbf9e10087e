"""What becomes of requests over an update: none is dropped, none meets KV of older weights."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import pytest
import torch

from tests.support.configurations import DENSE, DENSE_TP2, NEW, OLD, on
from tests.support.hf_reference import cache_of, continue_greedy, greedy, reference_model
from tests.support.offers import offered
from tests.support.served import Served
from tests.support.streams import Stream
from tests.support.waiting import until

PROMPT = OLD.prompts()[0]
LONG_PREFIX = [2 + (7 * index) % 300 for index in range(200)]
"""Several KV blocks that requests share."""


@pytest.fixture(autouse=True)
def old_weights(served: Served) -> Iterator[None]:
    """Every test begins with the old weights serving, and leaves no request behind."""
    served.restore(OLD)
    yield
    idle = {"running": 0, "waiting": 0}
    until(lambda: served.server.state()["requests"] == idle, otherwise=served.server.state)


def _switch_points(ids: list[int], prompt: list[int]) -> list[int]:
    """Lengths at which the stream may have changed over: what comes before is the old model's."""
    old = greedy(reference_model(OLD.folder), prompt, len(ids))
    same = next((at for at, (a, b) in enumerate(zip(ids, old, strict=True)) if a != b), len(ids))
    return list(range(1, same + 1))


@on(DENSE)
def test_a_held_stream_completes_and_recomputes_its_kv_by_default(served: Served) -> None:
    """Pause(keep), update, resume: the stream goes on as the new model would from its text."""
    server = served.server
    stream = Stream(server, PROMPT, 150)
    stream.wait_for(20)
    assert server.admin.post("/pause", json={"mode": "keep"}).status_code == 200
    report = served.install(NEW)
    assert server.state()["state"] == "paused", "only its caller ends a pause"
    assert server.admin.post("/resume").status_code == 200
    ids = stream.result()
    assert len(ids) == 150
    assert stream.finish_reason == "length"
    assert report["outcome"] == "installed"
    new = reference_model(NEW.folder)

    def recomputed(at: int, tokens: int) -> bool:
        return greedy(new, [*PROMPT, *ids[:at]], tokens) == ids[at : at + tokens]

    points = [at for at in _switch_points(ids, PROMPT) if at >= 20 and recomputed(at, 4)]
    assert any(recomputed(at, len(ids) - at) for at in points), (
        "the rest of the stream is not what the new weights say of the whole text"
    )


@on(DENSE, DENSE_TP2)
def test_a_held_stream_keeps_its_old_kv_when_asked(served: Served) -> None:
    """in_flight_kv keep: the new weights go on over KV of the old ones; others see none of it."""
    stream = Stream(served.server, [*LONG_PREFIX, *PROMPT], 120)
    stream.wait_for(10)
    served.install(NEW, in_flight_kv="keep")
    prompt = [*LONG_PREFIX, 5, 6, 7]
    new = reference_model(NEW.folder)
    assert served.server.greedy(prompt) == greedy(new, prompt, 16), "a new request met old KV"
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


@on(DENSE)
@pytest.mark.parametrize("in_flight_kv", ["recompute", "keep"])
@pytest.mark.parametrize("flush", [True, False])
def test_no_new_answer_uses_kv_of_the_old_weights(
    served: Served, in_flight_kv: str, flush: bool
) -> None:
    """A prefix that the old weights cached is computed anew for requests after the update."""
    prompt, server = [*LONG_PREFIX, *PROMPT], served.server
    old, new = reference_model(OLD.folder), reference_model(NEW.folder)
    assert server.greedy(prompt) == greedy(old, prompt, 16)
    assert server.greedy(prompt) == greedy(old, prompt, 16), "and again, from the cache"
    served.install(NEW, in_flight_kv=in_flight_kv, flush=flush)
    assert server.greedy(prompt) == greedy(new, prompt, 16)
    served.install(OLD, in_flight_kv=in_flight_kv, flush=flush)
    assert server.greedy(prompt) == greedy(old, prompt, 16)


@on(DENSE, DENSE_TP2)
@pytest.mark.parametrize("in_flight_kv", ["recompute", "keep"])
def test_a_request_queued_during_the_pause_is_answered_by_the_new_weights(
    served: Served, in_flight_kv: str
) -> None:
    """It arrives while paused, shares a cached prefix, and must still see only new KV."""
    prompt, server = [*LONG_PREFIX, 9, 9, 9], served.server
    server.greedy(prompt)
    server.admin.post("/pause", json={"mode": "keep"}).raise_for_status()
    queued = Stream(server, prompt, 16)
    time.sleep(0.5)
    served.install(NEW, in_flight_kv=in_flight_kv, resume=True)
    assert queued.result() == greedy(reference_model(NEW.folder), prompt, 16)


@on(DENSE)
@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_an_update_under_load_loses_no_request(served: Served, mode: str) -> None:
    """Streams before, during and after an update all end as their pause mode says."""
    streams = [Stream(served.server, [*PROMPT, extra], 100) for extra in range(2, 8)]
    for stream in streams:
        stream.wait_for(1)
    served.install(NEW, pause=mode)
    assert NEW.wrong_answers(served.server.greedy) == []
    for stream in streams:
        ids = stream.result()
        if mode == "abort":
            assert stream.finish_reason in ("abort", "length")
        else:
            assert (len(ids), stream.finish_reason) == (100, "length")


@on(DENSE)
def test_sources_outlive_what_their_trainer_forgets(served: Served) -> None:
    """Copies of tensors that cannot be read in place live as long as the offer does.

    Everything that can be freed is freed and written over with NaN, and pulled twice.
    """
    scattered = {
        name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor.clone()
        for name, tensor in NEW.tensors().items()
    }
    assert not scattered["lm_head.weight"].is_contiguous()
    with offered(served.server.admin, scattered) as offer:
        assert offer.source.copied_bytes > 0
        sizes = [tensor.shape for tensor in scattered.values()]
        del scattered
        for _ in range(2):
            gc.collect()
            junk = [torch.full(size, float("nan")) for size in sizes * 3]
            done = offer.update(served.next_version())
            assert done.status_code == 200, done.text
            assert NEW.wrong_answers(served.server.greedy) == []
            del junk
