"""Sleep and wake, for real on engines without a GPU: what the kernel says is resident decides."""

from __future__ import annotations

import contextlib
import http.client
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine_plugins.admin_client import AdminClient
from tests.support.configurations import DENSE, DENSE_TP2, NEW, OLD, SIZED, on
from tests.support.engine_server import TOKEN, EngineServer
from tests.support.engines import only, real_engines_here
from tests.support.hf_reference import greedy, reference_model
from tests.support.problems import problem
from tests.support.served import Served
from tests.support.stepping import Steps
from tests.support.streams import Stream
from tests.support.trainer_process import TrainerProcess
from tests.support.waiting import until

PROMPT = OLD.prompts()[0]
TOKENS = 12
HALF_WAY = 12
"""A module in the middle of the model's 35."""
GROWTH = 8 << 20
"""Between the halves of the cycles; a leak of 1 MiB in each would make 12."""


@pytest.fixture
def awake(served: Served) -> Served:
    """The old weights serve."""
    served.restore(OLD)
    return served


def sleep(server: EngineServer, **body: Any) -> dict[str, Any]:
    """Put a server to sleep; the answer."""
    answer = server.admin.post("/sleep", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def wake(server: EngineServer, tags: Sequence[str] | None = None) -> dict[str, Any]:
    """Wake a server, or some of its memory; the answer."""
    answer = server.admin.post("/wake", json={"tags": tags})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def hang_up(server: EngineServer, route: str, state: str) -> None:
    """Send a call and never read its answer; it comes to what it was to bring."""
    url, token = httpx.URL(server.url), server.admin.headers["authorization"]
    with contextlib.closing(http.client.HTTPConnection(url.host, url.port)) as connection:
        connection.request("POST", f"/admin/v1{route}", headers={"authorization": token})
        until(lambda: server.state()["state"] == state, otherwise=server.state)


def resident(server: EngineServer) -> int:
    """Bytes of the workers' memory, as the kernel counts them."""
    until(lambda: bool(server.state()["workers"]), otherwise=server.state)
    workers = [worker["pid"] for worker in server.state()["workers"]]
    return sum(_memory_of_its_own(pid) for pid in workers)


def components(answer: dict[str, Any], name: str) -> int:
    """Bytes of one part of what the ranks hold."""
    return sum(row["components"].get(name, 0) for row in answer["memory"]["rows"])


@on(DENSE, DENSE_TP2)
def test_requests_are_held_over_a_sleep_and_answered_after_it(awake: Served) -> None:
    """Those in the engine and those that come meanwhile; the weights are those of before."""
    server = awake.server
    before = server.state()["weights"]
    running = Stream(server, PROMPT, 100)
    running.wait_for(10)
    asleep = sleep(server)
    assert (asleep["state"], asleep["weights"]) == ("asleep", before)
    assert asleep["sleep"]["released"] == ["weights", "kv_cache"]
    assert asleep["sleep"]["verdict"] == asleep["memory"]["verdict"] == "pass"
    arriving = Stream(server, PROMPT, 16)
    risen = wake(server)
    assert (risen["state"], risen["sleep"], risen["weights"]) == ("serving", None, before)
    assert arriving.result() == OLD.expected()[0]
    assert running.result()[:16] == OLD.expected()[0]
    assert running.finish_reason == "length"
    assert OLD.wrong_answers(server.greedy) == []


@on(SIZED)
def test_cycle_after_cycle_under_load_memory_leaves_and_nothing_grows(served: Served) -> None:
    """Tokens, memory asleep and awake; the check finds nothing to refuse and no leak.

    Of the cache and the weights that the answer says are released, 90 % at least leave the
    workers; pages of the cache come back as they are used.
    """
    server, prompt = served.server, [1, 2, 3]
    said = server.greedy(prompt, TOKENS)
    mapped = _memory(server)["rows"]
    cache = sum(row["components"]["kv_cache"] for row in mapped)
    weights = sum(row["components"]["weights"] for row in mapped)
    full = resident(server)
    sleep(server, tags=["weights"])
    assert full - resident(server) > 0.9 * weights
    both = sleep(server, tags=["kv_cache"])
    assert full - resident(server) > 0.9 * (weights + cache)
    assert components(both, "weights") == components(both, "kv_cache") == 0
    wake(server)
    asleep, awake = [], []
    for _ in range(served.engine.sleep_cycles):
        held = Stream(server, prompt, TOKENS)
        held.wait_for(1)
        awake.append(resident(server))
        answer = sleep(server, tags=["kv_cache"])
        asleep.append(resident(server))
        assert answer["memory"]["verdict"] == "pass", answer["memory"]
        wake(server)
        assert held.result() == said
    assert server.greedy(prompt, TOKENS) == said
    if served.engine.kind != "in_memory":  # whose forward is Hugging Face's, in the same process
        assert asleep[0] < full - 0.9 * cache
        _does_not_grow(awake)
        _does_not_grow(asleep)
    assert [leak["leaking"] for leak in _memory(server)["leaks"]] == [False]


def _does_not_grow(figures: Sequence[int]) -> None:
    """A leak takes some with every cycle; a single step may be an allocator's own."""
    steps = [after - before for before, after in pairwise(figures[len(figures) // 4 :])]
    assert sum(steps) - max(steps) < GROWTH, list(figures)


def _memory(server: EngineServer) -> dict[str, Any]:
    return dict(server.admin.get("/memory").json())


@on(DENSE)
def test_weights_that_were_discarded_have_to_come_from_an_update(awake: Served) -> None:
    """Level 2: no version, no resume, no serving until an update completes."""
    server = awake.server
    asleep = sleep(server, level=2)
    assert asleep["weights"]["version"] is None
    held = Stream(server, PROMPT, 16)
    mapped = wake(server)
    assert mapped["state"] == "asleep"
    assert (mapped["sleep"]["released"], mapped["sleep"]["weights_lost"]) == ([], True)
    refused = server.admin.post("/resume")
    assert "weights were discarded" in problem(refused, 409, "illegal_state")
    assert "/weights/update" in refused.json()["remedy"]
    assert wake(server)["sleep"] == mapped["sleep"], "there is nothing left to map"
    report = awake.install(NEW)
    assert (report["outcome"], server.state()["state"]) == ("installed", "serving")
    assert held.result() == NEW.expected()[0]
    assert NEW.wrong_answers(server.greedy) == []


@on(DENSE)
def test_weights_can_be_brought_up_to_date_before_the_cache_is_mapped(awake: Served) -> None:
    """Wake by tags: an update needs the weights' memory and nothing else."""
    server = awake.server
    sleep(server, level=2)
    plan = awake.offer(NEW)
    refused = awake.update("plan-that-nobody-made")
    assert refused.status_code in (404, 409)
    connect = plan.connect()
    assert "weights' memory is released" in problem(connect, 409, "illegal_state")
    assert wake(server, ["weights"])["sleep"]["released"] == ["kv_cache"]
    report = awake.install(NEW)
    state = server.state()
    assert (state["state"], state["weights"]["version"]) == ("asleep", report["version"])
    assert state["sleep"]["weights_lost"] is False
    assert wake(server)["state"] == "serving"
    assert NEW.wrong_answers(server.greedy) == []


@on(DENSE_TP2)
def test_an_update_that_fails_half_way_is_repeated_before_the_cache_is_mapped(
    awake: Served, steps: Steps
) -> None:
    """Fenced, and no wake is a way out; the repeat finds the sleep as it was."""
    server = awake.server
    asleep = sleep(server, tags=["kv_cache"])["sleep"]
    offer, version = awake.offer(NEW), awake.next_version()
    steps.fail(rank=1, module=HALF_WAY)
    assert "rank 1" in problem(offer.update(version), 500, "engine_call_failed")
    fenced = server.state()
    assert (fenced["state"], fenced["sleep"]["released"]) == ("fenced", ["kv_cache"])
    assert problem(server.admin.post("/wake"), 409, "illegal_state")
    assert server.complete(PROMPT).status_code == 503
    repeated = offer.update(version)
    assert repeated.status_code == 200, repeated.text
    state = server.state()
    assert (state["state"], state["fence"], state["sleep"]) == ("asleep", None, asleep)
    assert state["weights"]["version"] == version
    assert wake(server)["state"] == "serving"
    assert NEW.wrong_answers(server.greedy) == []


@on(DENSE)
def test_an_update_of_weights_that_sleep_kept(awake: Served) -> None:
    """Level 1, then the same: the engine ends up with the new weights, and lands bytes again."""
    server = awake.server
    awake.install(NEW)
    awake.install(OLD)
    sleep(server)
    wake(server, ["weights"])
    report = awake.install(NEW, mode="in_place")
    wake(server)
    assert NEW.wrong_answers(server.greedy) == []
    direct = sum(rank["direct_bytes"] for rank in report["ranks"])
    assert not awake.lands_directly or direct == report["bytes_needed"]


@on(DENSE)
def test_a_call_whose_answer_was_lost_is_repeated(awake: Served) -> None:
    """The same call again is 200 with what it was to bring, also after a caller that hung up."""
    server = awake.server
    held = Stream(server, PROMPT, TOKENS)
    first = sleep(server)
    again = sleep(server)
    assert again["sleep"] == first["sleep"]
    assert again["memory"].keys() == first["memory"].keys()
    assert (again["memory"]["verdict"], again["state"]) == ("pass", "asleep")
    for tags in (["weights"], ["weights"]):
        assert wake(server, tags)["sleep"]["released"] == ["kv_cache"]
    hang_up(server, "/wake", "serving")
    for _ in range(2):
        assert wake(server)["state"] == "serving"
    assert held.result() == server.greedy(PROMPT, TOKENS)
    hang_up(server, "/sleep", "asleep")
    assert sleep(server, tags=["kv_cache"])["sleep"]["released"] == ["weights", "kv_cache"]
    assert wake(server)["state"] == "serving"
    for route, state in (("/pause", "paused"), ("/resume", "serving")):
        hang_up(server, route, state)
        for _ in range(2):
            assert server.admin.post(route).json()["state"] == state
    assert OLD.wrong_answers(server.greedy) == []


@on(DENSE)
@only(*real_engines_here())
def test_requests_of_every_kind_outlive_a_sleep(
    awake: Served, background: ThreadPoolExecutor
) -> None:
    """In a prefill, a stream, several sequences, and new ones; who hangs up frees the request."""
    server = awake.server
    stream = Stream(server, PROMPT, 120)
    several = background.submit(_four_sequences, server, 60)
    stream.wait_for(5)
    prompts = [[2 + (each + 7 * index) % 300 for index in range(400)] for each in range(3)]
    prefills = [background.submit(server.greedy, prompt, 4) for prompt in prompts]
    sleep(server)
    held = len(stream.ids)
    new = background.submit(server.greedy, PROMPT)
    with pytest.raises(httpx.ReadTimeout):
        _post(server, PROMPT, 200, timeout=0.5)
    assert not new.done()
    assert len(stream.ids) == held < 120
    assert wake(server)["state"] == "serving"
    model = reference_model(OLD.folder)
    assert stream.result() == greedy(model, PROMPT, 120)
    assert new.result(30) == OLD.expected()[0]
    assert [each.result(30) for each in prefills] == [greedy(model, each, 4) for each in prompts]
    assert several.result(30) == [60] * 4
    idle = {"running": 0, "waiting": 0}
    until(lambda: server.state()["requests"] == idle, within_s=5, otherwise=server.state)


def _post(
    server: EngineServer, prompt: Sequence[int], tokens: int, *, n: int = 1, timeout: float = 60
) -> httpx.Response:
    # Several sequences of one prompt have to differ, says vLLM.
    sampling: dict[str, Any] = {"temperature": float(n > 1), "ignore_eos": True, "n": n}
    if server.kind == "sglang":
        sampling["max_new_tokens"] = tokens
        body: dict[str, Any] = {"input_ids": prompt, "sampling_params": sampling}
        return server.http.post("/generate", json=body, timeout=timeout)
    body = {"prompt": prompt, "max_tokens": tokens, "return_token_ids": True, **sampling}
    return server.http.post("/v1/completions", json=body, timeout=timeout)


def _four_sequences(server: EngineServer, tokens: int) -> list[int]:
    """How many tokens each of them got."""
    answer = _post(server, PROMPT, tokens, n=4).raise_for_status().json()
    if server.kind == "sglang":
        return [len(each["output_ids"]) for each in answer]
    return [len(each["token_ids"]) for each in answer["choices"]]


@on(DENSE)
def test_what_is_illegal_is_refused_with_the_way_out(awake: Served) -> None:
    """A sleep of another level, anything else while asleep: 409, and nothing has changed."""
    server = awake.server
    assert problem(server.admin.post("/sleep", json={"tags": ["gold"]}), 400, "malformed_request")
    assert problem(server.admin.post("/sleep", json={"tags": []}), 400, "malformed_request")
    graphs = server.admin.post("/sleep", json={"tags": ["cuda_graph"]})
    assert "cannot release 'cuda_graph'" in problem(graphs, 422, "unsupported")
    assert server.state()["state"] == "serving"
    sleep(server, tags=["kv_cache"])
    for route in ("/pause", "/resume", "/flush"):
        refused = server.admin.post(route)
        assert "asleep" in problem(refused, 409, "illegal_state")
        assert "/wake" in refused.json()["remedy"]
    state = server.state()
    assert (state["state"], state["sleep"]["released"]) == ("asleep", ["kv_cache"])
    sleep(server)
    discard = server.admin.post("/sleep", json={"level": 2})
    assert "released already, and kept" in problem(discard, 409, "illegal_state")
    assert "/wake" in discard.json()["remedy"]
    assert wake(server)["state"] == "serving"
    assert OLD.wrong_answers(server.greedy) == []


@on(DENSE)
def test_an_engine_that_was_paused_is_paused_after_its_sleep(awake: Served) -> None:
    """Whoever paused it resumes it."""
    server = awake.server
    server.admin.post("/pause", json={"mode": "keep"}).raise_for_status()
    sleep(server)
    risen = wake(server)
    assert (risen["state"], risen["pause"]["mode"]) == ("paused", "keep")
    assert server.admin.post("/resume").json()["state"] == "serving"
    assert OLD.wrong_answers(server.greedy) == []


@on(DENSE)
def test_nobody_sleeps_while_an_update_is_under_way(
    awake: Served, trainer: TrainerProcess, background: ThreadPoolExecutor
) -> None:
    """409 that names the version, and the update completes."""
    server = awake.server
    plan, version = trainer.connect(server.admin), awake.next_version()
    trainer.signal(signal.SIGSTOP)
    pull = background.submit(awake.update, plan, version)
    until(lambda: server.state()["state"] == "updating", within_s=5, otherwise=server.state)
    refused = server.admin.post("/sleep")
    trainer.signal(signal.SIGCONT)
    told = problem(refused, 409, "illegal_state")
    assert f"version {version}" in told
    assert "is under way" in told
    assert pull.result(30).status_code == 200
    assert NEW.wrong_answers(server.greedy) == []


@on(DENSE)
def test_a_trainer_shares_time_through_the_client(awake: Served) -> None:
    """Typed answers; asleep and awake again."""
    with AdminClient(awake.server.url, token=TOKEN) as client:
        report = client.sleep(tags=["kv_cache"])
        assert (report.verdict, report.refused) == ("pass", False)
        assert client.state().state == "asleep"
        assert [row.tp_rank for row in client.memory().rows] == [0]
        assert client.wake().state == "serving"


@on(DENSE)
def test_the_log_says_what_releases_memory(awake: Served) -> None:
    """On the CPU it is ours, whatever the engine has for GPUs."""
    said = awake.server.log.read_text()
    assert "rank 0 can release weights, kv_cache, by HostMemory" in said


@on(DENSE)
def test_memory_says_where_its_figures_come_from(awake: Served) -> None:
    """Per rank: process, source, quality and parts; the same while asleep."""
    server = awake.server
    for _ in range(2):
        report = _memory(server)
        for row, worker in zip(report["rows"], server.state()["workers"], strict=True):
            assert (row["tp_rank"], row["process"]["pid"]) == (worker["tp_rank"], worker["pid"])
            assert (row["sample"]["source"], row["sample"]["quality"]) == ("process", "exact")
            own = _memory_of_its_own(worker["pid"])
            assert abs(row["sample"]["resident_bytes"] - own) < 16 << 20
        server.admin.post("/sleep")


def _memory_of_its_own(pid: int) -> int:
    """Resident bytes that no file backs, as the kernel counts them."""
    lines = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return sum(int(lines[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))
