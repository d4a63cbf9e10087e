"""A process of the engine that stands still in the middle of an update.

Real engines alone: the one in memory is a single process.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.chaos_update.processes import held
from tests.support.configurations import DENSE_TP2, NEW, OLD, on
from tests.support.engines import only, real_engines_here
from tests.support.problems import problem
from tests.support.served import Served
from tests.support.stepping import Steps
from tests.support.waiting import until

pytestmark = [on(DENSE_TP2), only(*real_engines_here())]

TIMEOUT_S = 3.0
HALF_WAY = 12
PROMPT = OLD.prompts()[0]


@pytest.fixture(autouse=True)
def healthy(served: Served) -> Iterator[None]:
    served.restore(OLD)
    yield
    served.restore(OLD)


def _worker(served: Served, rank: int) -> int:
    until(lambda: bool(served.server.state()["workers"]), otherwise=served.server.state)
    found = {each["tp_rank"]: each["pid"] for each in served.server.state()["workers"]}
    return int(found[rank])


def test_a_stopped_worker_is_named_in_time_and_fenced_until_a_good_update(
    served: Served, steps: Steps, background: ThreadPoolExecutor
) -> None:
    """Not the other rank; held requests end, and what it does when it goes on is published nowhere.

    Its pid, as the kernel sees it, and within the update's own time.
    """
    server = served.server
    plan = served.offer(NEW).connect().json()["plan_id"]
    version, pid = served.next_version(), _worker(served, 1)
    hold = steps.hold(rank=1, module=HALF_WAY)
    update = background.submit(served.update, plan, version, timeout_s=TIMEOUT_S, mode="in_place")
    began = time.monotonic()
    until(
        lambda: (server.state()["update"] or {}).get("phase") == "install",
        otherwise=server.state,
    )
    waiting = background.submit(server.complete, PROMPT)
    time.sleep(0.3)
    with held([pid]):
        hold.unlink()
        answer = update.result(30)
        assert time.monotonic() - began < TIMEOUT_S + 5
        detail = problem(answer, 504, "engine_stuck")
        assert f"rank 1 (pid {pid}) is stopped" in detail
        assert "rank 0" not in detail
        state = server.state()
        assert (state["state"], state["fence"]["code"]) == ("fenced", "engine_stuck")
        assert f"(pid {pid}) is stopped" in state["fence"]["detail"]
        assert server.complete(PROMPT).status_code == 503
        assert waiting.result(10).status_code == 503
    time.sleep(1.5)
    state = server.state()
    assert (state["state"], state["weights"]["version"]) == ("fenced", None)
    assert server.complete(PROMPT).status_code == 503
    done = served.offer(NEW).update(version)
    assert done.status_code == 200, done.text
    assert NEW.wrong_answers(server.greedy) == []


def test_a_worker_that_stands_still_for_a_moment_costs_nothing(
    served: Served, steps: Steps, background: ThreadPoolExecutor
) -> None:
    """An update that ends in its time is installed."""
    plan = served.offer(NEW).connect().json()["plan_id"]
    pid = _worker(served, 0)
    hold = steps.hold(rank=0, module=HALF_WAY)
    update = background.submit(served.update, plan, timeout_s=20.0, mode="in_place")
    until(
        lambda: (served.server.state()["update"] or {}).get("phase") == "install",
        otherwise=served.server.state,
    )
    os.kill(pid, signal.SIGSTOP)
    hold.unlink()
    time.sleep(1.0)
    os.kill(pid, signal.SIGCONT)
    answer = update.result(30)
    assert answer.status_code == 200, answer.text
    assert NEW.wrong_answers(served.server.greedy) == []
