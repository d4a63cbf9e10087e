"""The prefill gate of every real engine, under a limit that the engine's process cannot pass."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from engine_plugins.prefill_gate.engine_gate import PUBLISH_S
from engine_plugins.prefill_gate.entry import LIMITS_LAST_S
from engine_plugins.prefill_gate.gate import MAX_WAIT_S
from engine_plugins.prefill_gate.rank_meter import LOOK_S
from tests.support.besieged import LONG, Siege, Sieged
from tests.support.chaos import scored
from tests.support.chaos_run import attack, faults
from tests.support.engine_server import EngineServer
from tests.support.engines import IN_MEMORY, SGLANG, VLLM, engines_here
from tests.support.gate_requests import ROUTES, asked, words
from tests.support.streams import Stream
from tests.support.waiting import until

pytestmark = pytest.mark.engine

REAL = [engine for engine in engines_here() if engine is not IN_MEMORY]
SMALL, TOO_LONG = 16, 6000
HOSTILE = 36
CHAT = [3, 1, 4, 1, 5]
MEASURED = {"vllm": (450, 700, 1000), "sglang": (300, 450, 700)}
"""Lengths that are not cut."""
MIB = 1 << 20
NO_ROOM = 1
"""A cap under what any engine holds."""
STARVED_BYTES = 256 << 10
"""Less than 32 tokens take."""
LOST = {"vllm": "ran out of memory", "sglang": "memory ended"}
"""What an engine says to a request whose step found no memory, and below what it logs."""
LOGGED = {"vllm": "The step is taken back", "sglang": "its 1 requests are ended"}
UNCUT = {
    "vllm": ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"),
    "sglang": ("--chunked-prefill-size", "-1"),
}
on_each_route = pytest.mark.parametrize(
    "route", [route for engine in REAL for route in ROUTES[engine.kind]]
)


def test_what_has_no_room_at_once_is_cut_and_says_the_same(siege: Siege, sieged: Sieged) -> None:
    """Tokens are those of an engine with room, and so are the prompt's log-probabilities."""
    before = siege.gate()["decisions"]["shrink"]
    answer = scored(siege.server, siege.prompt(LONG, 7), 4)
    assert answer.status_code == 200, answer.text
    assert siege.gate()["decisions"]["shrink"] > before
    cut, whole = _scores(siege, answer.json()), _scores(siege, sieged.answer)
    assert cut[0] == whole[0]
    assert cut[1] == pytest.approx(whole[1], abs=1e-4)


def test_small_requests_are_answered_among_large_ones(siege: Siege) -> None:
    alone = siege.server.greedy(CHAT, 8)
    with ThreadPoolExecutor(6) as pool:
        large = [
            pool.submit(scored, siege.server, siege.prompt(LONG, seed)) for seed in range(20, 23)
        ]
        small = [pool.submit(siege.server.greedy, CHAT, 8) for _ in range(12)]
        assert [each.result() for each in small] == [alone] * 12
        assert {each.result().status_code for each in large} <= {200, 503}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_can_never_run_is_refused_before_anything_is_sent(siege: Siege, stream: bool) -> None:
    """What prompt logprobs keep does not fit, however the prompt is cut."""
    siege.configure(cap_bytes=NO_ROOM)
    assert _fits(siege.server.oversized(stream=stream)) == 0
    assert siege.server.greedy(CHAT, 2), "an idle engine runs what is small"


def test_a_step_that_finds_no_memory_ends_its_largest_prompt_and_no_other(siege: Siege) -> None:
    """The gate only watches: the step is run, fails, and is taken back or undone."""
    alone = siege.server.greedy(CHAT, 200)
    siege.configure(mode="observe")
    other = Stream(siege.server, CHAT, 200)
    other.wait_for(5)
    answer = scored(siege.server, siege.prompt(LONG, 30))
    assert answer.status_code == 503, answer.text
    assert LOST[siege.server.kind] in answer.text
    assert other.result() == alone
    assert siege.server.greedy(CHAT, 200) == alone
    assert siege.gate()["exceeded"] >= 1, "the next one like it is judged by it"
    assert LOGGED[siege.server.kind] in siege.server.log.read_text()
    siege.configure(mode="enforce")
    assert scored(siege.server, siege.prompt(LONG, 30)).status_code == 200


def test_what_it_measured_is_what_it_had_predicted(siege: Siege) -> None:
    """Of lengths that no line was drawn from; each told before it was learned."""
    measured = MEASURED[siege.server.kind]
    for tokens in measured:
        scored(siege.server, siege.prompt(tokens, 40)).raise_for_status()
    siege.server.greedy(CHAT, 1)
    steps = [each for each in siege.gate()["recent"] if each["tokens"] in measured]
    scored_steps = [each for each in steps if each["prompt_logprob_rows"]]
    assert len(scored_steps) == 3
    for step in scored_steps:
        assert step["predicted_bytes"] == pytest.approx(step["measured_bytes"], rel=0.01)


def test_a_hostile_mixture_ends_nothing_and_small_requests_are_answered(
    siege: Siege, sieged: Sieged
) -> None:
    """Nothing dies, nothing breaks off, and nothing is refused that would have fitted.

    A few dozen requests; `make chaos-gate` sends thousands.
    """
    siege.unlimit_addresses()
    time.sleep(3 * LOOK_S)  # then it sees the limit that comes, and not the one that there was
    judgement, outcomes = attack(siege, sieged.needs, requests=HOSTILE, seed=3)
    assert faults(judgement, HOSTILE, alive=siege.lives()) == [], judgement.table
    assert len(outcomes) == HOSTILE


def test_away_from_the_cap_prefills_run_unasked_and_say_the_same(uncut: Siege) -> None:
    """Once sizes are known; whoever asks for more than tokens is judged among them."""
    lengths = (64, 200, 500, 1500, 4000)
    for tokens in lengths * 2:
        uncut.server.greedy(uncut.prompt(tokens, 59), 1)
        uncut.server.admin.post("/flush").raise_for_status()
    prompts = [uncut.prompt(tokens, 60) for tokens in lengths]
    alone = [uncut.server.greedy(prompt, 8) for prompt in prompts]
    busy = _busy(uncut)
    before = uncut.gate()
    assert [uncut.server.greedy(prompt, 8) for prompt in prompts] == alone
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(lambda prompt: uncut.server.greedy(prompt, 8), prompts)) == alone
    after = uncut.gate()
    assert after["cleared_steps"] - before["cleared_steps"] >= len(prompts)
    assert after["decisions"]["run"] - before["decisions"]["run"] < 2 * len(prompts)
    scored(uncut.server, uncut.prompt(300, 61)).raise_for_status()
    assert uncut.gate()["decisions"]["run"] > after["decisions"]["run"]
    assert busy.is_alive()
    _end_all(uncut)


def test_nearer_to_the_cap_small_prompts_run_unasked_and_large_ones_asked(uncut: Siege) -> None:
    """Large is what would not fit twice."""
    assert uncut.server.greedy(uncut.prompt(4000, 62), 1)
    recent = uncut.gate()["recent"]
    large = max(step["tokens"] for step in recent)
    latest = [step for step in recent if step["tokens"] == large][-1]
    needed = 1.5 * latest["measured_bytes"] + 2 * latest["margin_bytes"]
    uncut.configure(cap_bytes=uncut.gate()["used_bytes"] + round(needed))
    try:
        busy = _busy(uncut)
        before = uncut.gate()
        for seed in range(63, 73):
            assert uncut.server.greedy(uncut.prompt(100, seed), 1)
        after = uncut.gate()
        assert after["cleared_steps"] - before["cleared_steps"] >= 8
        assert after["decisions"]["run"] - before["decisions"]["run"] <= 2
        assert uncut.server.greedy(uncut.prompt(large, 73), 1)
        assert uncut.gate()["decisions"]["run"] > after["decisions"]["run"]
        assert busy.is_alive()
    finally:
        _end_all(uncut)
        uncut.configure(cap_bytes=None)


def _busy(siege: Siege) -> Stream:
    """Somebody is answered for long, and steps behind that are cleared."""
    busy = Stream(siege.server, CHAT, 4000)
    busy.wait_for(5)
    before = siege.gate()["cleared_steps"]
    until(
        lambda: bool(siege.server.greedy(CHAT, 20)) and siege.gate()["cleared_steps"] > before,
        otherwise=lambda: f"no step was cleared: {siege.gate()}",
    )
    return busy


def _end_all(siege: Siege) -> None:
    siege.server.admin.post("/pause", json={"mode": "abort"}).raise_for_status()
    siege.server.admin.post("/resume").raise_for_status()


@pytest.fixture
def tight(uncut: Siege) -> Iterator[Siege]:
    """The same, with room for some hundred tokens."""
    assert uncut.server.greedy(CHAT, 2)
    uncut.configure(cap_bytes=uncut.gate()["used_bytes"] + 64 * MIB)
    yield uncut
    uncut.configure(cap_bytes=None)
    assert uncut.lives(), uncut.server.log_tail()


def test_an_idle_engine_without_memory_for_even_a_chunk_refuses_for_now(uncut: Siege) -> None:
    """It would not outlive the step; as soon as there is memory, the same prompt runs."""
    prompt = uncut.prompt(32, 70)
    uncut.limit_addresses(STARVED_BYTES)
    time.sleep(3 * LOOK_S)
    try:
        assert _retry_after_s(uncut.server.complete(prompt, 2)) >= 1
    finally:
        uncut.unlimit_addresses()
    time.sleep(3 * LOOK_S)
    assert uncut.server.complete(prompt, 2).status_code == 200
    assert uncut.lives(), uncut.server.log_tail()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@on_each_route
def test_what_is_too_large_is_told_what_fits(tight: Siege, route: str, stream: bool) -> None:
    """413 on every route before anything is sent, and what is just small enough is answered."""
    assert 64 <= _fits(asked(tight.server, route, TOO_LONG, stream=stream)) < TOO_LONG
    assert asked(tight.server, route, 64, stream=stream).status_code == 200


def test_a_stream_to_an_engine_that_was_idle_is_refused_by_its_status(tight: Siege) -> None:
    """The door does not believe limits that are old: the scheduler is the first to look."""
    before = tight.gate()["decisions"]["too_large"]
    time.sleep(LIMITS_LAST_S + 0.5)
    with ThreadPoolExecutor() as pool:
        for answer in [pool.submit(ask) for ask in _streams(tight.server)]:
            assert 64 <= _fits(answer.result()) < TOO_LONG
    assert tight.gate()["decisions"]["too_large"] > before


@pytest.mark.skipif(VLLM not in REAL, reason="SGLang holds them in front of its door")
def test_a_stream_that_the_door_has_let_in_is_refused_by_its_status(uncut: Siege) -> None:
    """There was room when it came to a paused engine; there is none when that resumes.

    Of two prompts in one stream the small one has its tokens before the other is refused.
    """
    tight_bytes = uncut.gate()["used_bytes"] + 64 * MIB
    before = uncut.gate()["decisions"]["too_large"]
    uncut.server.admin.post("/pause").raise_for_status()
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(ask) for ask in _streams(uncut.server)]
        until(
            lambda: uncut.server.state()["requests"]["waiting"] == len(answers) + 2,
            otherwise=lambda: f"not all have come: {uncut.server.state()['requests']}",
        )
        uncut.configure(cap_bytes=tight_bytes)
        uncut.server.admin.post("/resume").raise_for_status()
        for answer in answers:
            assert 64 <= _fits(answer.result()) < TOO_LONG
    assert uncut.gate()["decisions"]["too_large"] >= before + len(answers)
    uncut.configure(cap_bytes=None)
    assert uncut.lives(), uncut.server.log_tail()


@pytest.mark.skipif(SGLANG not in REAL, reason="it takes half a minute: one engine is enough")
def test_who_waits_for_too_long_is_told_when_to_come_back(uncut: Siege) -> None:
    """503 in time for those who wait, and at the door for the streams that come then."""
    routes = ROUTES[uncut.server.kind]
    running = [Stream(uncut.server, CHAT, 7000) for _ in range(2)]
    for each in running:
        each.wait_for(5)
    uncut.configure(cap_bytes=NO_ROOM)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(asked, uncut.server, routes[0], SMALL, stream=True)
        answers = [pool.submit(asked, uncut.server, route, SMALL, stream=False) for route in routes]
        for answer in answers:
            assert _retry_after_s(answer.result()) >= 1
        until(
            lambda: uncut.gate()["longest_wait_s"] > MAX_WAIT_S + 2 * PUBLISH_S,
            otherwise=lambda: f"nobody waits: {uncut.gate()}",
        )
        for route in routes:
            assert _retry_after_s(asked(uncut.server, route, SMALL, stream=True)) >= 1
        assert all(each.is_alive() for each in running)
        uncut.server.admin.post("/pause", json={"mode": "abort"}).raise_for_status()
        uncut.configure(cap_bytes=None)
        uncut.server.admin.post("/resume").raise_for_status()
        assert waiting.result().status_code == 200
    assert uncut.lives(), uncut.server.log_tail()


def test_without_the_gate_the_engine_dies(uncut: Siege) -> None:
    """The same prompt and the same limit: the last that is asked of this server."""
    uncut.limit_addresses()
    uncut.configure(mode="off", cap_bytes=None)
    assert uncut.server.greedy(CHAT, 2)
    try:
        status = scored(uncut.server, uncut.prompt(LONG, 50)).status_code
    except httpx.HTTPError:
        status = 0
    assert status != 200
    until(lambda: not _answers(uncut), within_s=60, otherwise=lambda: "it still answers")


def _streams(server: EngineServer) -> list[Callable[[], httpx.Response]]:
    """Streams that are too large: on each route, and one of several prompts and sequences."""
    asks = [
        functools.partial(asked, server, route, TOO_LONG, stream=True)
        for route in ROUTES[server.kind]
    ]
    completion = functools.partial(asked, server, "/v1/completions", 0, stream=True)
    prompts = [words(64), words(TOO_LONG)]
    return [
        *asks,
        functools.partial(completion, prompt=prompts, max_tokens=100),
        functools.partial(completion, prompt=words(TOO_LONG), n=2, temperature=1),
    ]


def _retry_after_s(answer: httpx.Response) -> int:
    """When a refusal says to come back."""
    assert answer.status_code == 503, answer.text
    assert "event-stream" not in answer.headers["content-type"]
    assert answer.json()["code"] == "memory_pressure"
    assert f"try again after {answer.headers['Retry-After']} s" in answer.text
    return int(answer.headers["Retry-After"])


def _fits(answer: httpx.Response) -> int:
    """The largest prompt that a refusal names, in words too."""
    assert answer.status_code == 413, answer.text
    assert "event-stream" not in answer.headers["content-type"]
    told = answer.json()
    assert told["code"] == "prompt_too_large"
    assert f"at most {told['largest_prompt']} tokens" in answer.text or not told["largest_prompt"]
    return int(told["largest_prompt"])


def _scores(siege: Siege, answer: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Generated ids, and log-probabilities of the prompt's tokens; the first has none."""
    if siege.server.kind == "vllm":
        [choice] = answer["choices"]
        ids, told = choice["token_ids"], choice["prompt_logprobs"]
        found = [next(iter(each.values()))["logprob"] for each in told[1:]]
    else:
        ids, told = answer["output_ids"], answer["meta_info"]["input_token_logprobs"]
        found = [each[0] for each in told[1:]]
    assert len(found) == LONG - 1
    return ids, found


def _answers(siege: Siege) -> bool:
    try:
        return siege.server.complete(CHAT, 1).status_code == 200
    except httpx.HTTPError:
        return False
