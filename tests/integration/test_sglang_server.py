"""SGLang as this environment has it is the real thing: it says what HF transformers says."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.support.engine_server import StreamEvent
from tests.support.live_models import LiveModel
from tests.support.sglang_server import SglangServer, sglang_server

pytestmark = pytest.mark.engine

SERVERS = [
    pytest.param((LiveModel(kind="qwen3_live", version=0), 1, 1), id="qwen3-tp1"),
    pytest.param((LiveModel(kind="qwen3_moe_live", version=0), 1, 1), id="qwen3_moe-tp1"),
    pytest.param((LiveModel(kind="qwen2_live", version=1), 2, 2), id="qwen2-tp2-two-api-servers"),
    pytest.param((LiveModel(kind="qwen3_moe_live", version=1), 2, 1), id="qwen3_moe-tp2"),
]
"""A model, its ranks, and API servers: dense, tied with QKV biases, and mixture of experts."""

Served = tuple[LiveModel, SglangServer]


@pytest.fixture(scope="module", params=SERVERS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server of each configuration in turn."""
    model, tensor_parallel, api_servers = request.param
    folder = tmp_path_factory.mktemp("server")
    with sglang_server(
        model.copy_to(folder / "model"),
        folder / "server.log",
        tensor_parallel=tensor_parallel,
        api_servers=api_servers,
        preload=True,
    ) as server:
        yield model, server


@pytest.fixture
def server(served: Served) -> SglangServer:
    """The server alone."""
    return served[1]


def test_greedy_tokens_are_those_of_hf_transformers(served: Served) -> None:
    model, server = served
    assert model.wrong_answers(server.greedy) == []


def test_a_stream_tells_every_token_once(served: Served) -> None:
    model, server = served
    events = list(server.stream(model.prompts()[0], 16))
    assert [token for event in events for token in event.token_ids] == model.expected()[0]
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
