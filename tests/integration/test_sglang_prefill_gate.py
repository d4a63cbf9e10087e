"""The prefill gate of SGLang under a limit that its scheduler's process cannot pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.besieged import Siege, besieged
from tests.support.chaos import scored
from tests.support.engine_server import TOKEN
from tests.support.engines import SGLANG
from tests.support.gate_models import QUICK
from tests.support.live_models import LiveModel
from tests.support.sglang_server import sglang_server
from tests.support.streams import Stream
from tests.support.waiting import until

pytestmark = pytest.mark.engine

LONG = 2048
CHAT = [3, 1, 4, 1, 5]
NO_ROOM = 1
"""A cap under what any engine holds."""

Sieged = tuple[Siege, dict[str, Any]]


@pytest.fixture(scope="module")
def sieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sieged]:
    """A calibrated server that has too little room for a long prompt with all its logits.

    With it comes what it said of such a prompt when it had room, and no gate.
    """
    with besieged(SGLANG, tmp_path_factory.mktemp("siege"), mode="observe", model=QUICK) as siege:
        siege.calibrate()
        siege.configure(mode="off")
        answer = scored(siege.server, siege.prompt(LONG, 7), 4).json()
        siege.server.admin.post("/flush").raise_for_status()
        siege.limit_addresses()
        yield siege, answer


@pytest.fixture
def siege(sieged: Sieged) -> Iterator[Siege]:
    """The gate is in force; the engine lives when the test has ended."""
    siege, _ = sieged
    siege.configure(mode="enforce", cap_bytes=None)
    yield siege
    siege.configure(mode="enforce", cap_bytes=None)
    assert siege.lives(), siege.server.log_tail()


def test_what_has_no_room_at_once_is_cut_and_says_the_same(siege: Siege, sieged: Sieged) -> None:
    """Tokens are those of an engine with room, and so are the prompt's log-probabilities."""
    before = siege.gate()["decisions"]["shrink"]
    answer = scored(siege.server, siege.prompt(LONG, 7), 4)
    assert answer.status_code == 200, answer.text
    assert siege.gate()["decisions"]["shrink"] > before
    assert answer.json()["output_ids"] == sieged[1]["output_ids"]
    assert _logprobs(answer.json()) == pytest.approx(_logprobs(sieged[1]), abs=1e-4)


def test_small_requests_are_answered_among_large_ones(siege: Siege) -> None:
    alone = siege.server.greedy(CHAT, 8)
    with ThreadPoolExecutor(6) as pool:
        large = [
            pool.submit(scored, siege.server, siege.prompt(LONG, seed)) for seed in range(20, 23)
        ]
        small = [pool.submit(siege.server.greedy, CHAT, 8) for _ in range(12)]
        assert [each.result() for each in small] == [alone] * 12
        assert {each.result().status_code for each in large} <= {200, 503}


@pytest.mark.parametrize("stream", [False, True])
def test_what_can_never_run_is_refused_before_anything_is_sent(siege: Siege, stream: bool) -> None:
    """What prompt logprobs keep does not fit, however the prompt is cut."""
    siege.configure(cap_bytes=NO_ROOM)
    answer = siege.server.oversized(stream=stream)
    assert answer.status_code == 413, answer.text
    assert answer.json()["code"] == "prompt_too_large"
    assert answer.json()["largest_prompt"] == 0
    assert siege.server.greedy(CHAT, 2), "an idle engine runs what is small"


def test_a_step_that_finds_no_memory_ends_its_requests_and_no_others(siege: Siege) -> None:
    """The gate only watches: the step is run, fails, and is undone."""
    alone = siege.server.greedy(CHAT, 200)
    siege.configure(mode="observe")
    other = Stream(siege.server, CHAT, 200)
    other.wait_for(5)
    answer = scored(siege.server, siege.prompt(LONG, 30))
    assert answer.status_code == 503, answer.text
    assert "memory ended" in answer.text
    assert other.result() == alone
    assert siege.server.greedy(CHAT, 200) == alone
    assert siege.gate()["exceeded"] >= 1, "the next one like it is judged by it"


def test_what_it_measured_is_what_it_had_predicted(siege: Siege) -> None:
    """Of lengths that no line was drawn from; each told before it was learned."""
    for tokens in (300, 450, 700):
        scored(siege.server, siege.prompt(tokens, 40)).raise_for_status()
    siege.server.greedy(CHAT, 1)
    steps = [each for each in siege.gate()["recent"] if each["tokens"] in (300, 450, 700)]
    scored_steps = [each for each in steps if each["prompt_logprob_rows"]]
    assert len(scored_steps) == 3
    for step in scored_steps:
        assert step["predicted_bytes"] == pytest.approx(step["measured_bytes"], rel=0.01)


def test_without_the_gate_the_engine_dies(tmp_path: Path) -> None:
    """The same prompt and the same limit."""
    with besieged(SGLANG, tmp_path, mode="off", model=QUICK) as siege:
        assert siege.server.greedy(CHAT, 2)
        siege.limit_addresses()
        try:
            status = scored(siege.server, siege.prompt(LONG)).status_code
        except httpx.HTTPError:
            status = 0
        assert status != 200
        until(lambda: not _answers(siege), within_s=60, otherwise=lambda: "it still answers")


def test_all_ranks_decide_alike(tmp_path: Path) -> None:
    """What each logged of its decisions, which have figures in them that no other rank has read."""
    model = LiveModel(kind="qwen3_live", version=0)
    log = tmp_path / "log"
    with sglang_server(
        model.copy_to(tmp_path / "model"),
        log,
        tensor_parallel=2,
        arguments=["--engine-plugins-prefill-gate", "enforce"],
        environment={
            "ENGINE_PLUGINS_ADMIN_TOKEN": TOKEN,
            "ENGINE_PLUGINS_PREFILL_CALIBRATION_DIR": str(tmp_path / "calibration"),
        },
        preload=True,
    ) as server:
        assert model.wrong_answers(server.greedy) == []
        server.admin.patch("/prefill-gate", json={"cap_bytes": NO_ROOM}).raise_for_status()
        running = Stream(server, model.prompts()[0], 60)
        running.wait_for(3)
        with ThreadPoolExecutor(3) as pool:
            said = list(pool.map(server.greedy, model.prompts()[:3]))
        assert said == model.expected()[:3]
        assert len(running.result()) == 60
        assert server.complete(range(2, 300), 4).status_code == 200
        assert server.oversized().status_code == 413
    decided: dict[str, list[str]] = {"TP0": [], "TP1": []}
    for line in log.read_text().splitlines():
        if found := re.search(r"(TP\d)\] prefill gate, mode enforce: (.*)", line):
            decided[found[1]].append(found[2])
    assert decided["TP0"]
    assert decided["TP0"] == decided["TP1"]


def _logprobs(answer: dict[str, Any]) -> list[float]:
    """Those of the prompt; its first token has none."""
    told = answer["meta_info"]["input_token_logprobs"]
    assert len(told) == LONG
    return [each[0] for each in told[1:]]


def _answers(siege: Siege) -> bool:
    try:
        return siege.server.complete(CHAT, 1).status_code == 200
    except httpx.HTTPError:
        return False
