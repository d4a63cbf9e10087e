"""A long pull hurries nobody, with one API process and with two.

The wire is tcp, where a stopped trainer really stalls a read.
"""

from __future__ import annotations

import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from tests.support.configurations import DENSE, DENSE_TP2, NEW, OLD, on
from tests.support.problems import problem
from tests.support.served import Served
from tests.support.trainer_process import TrainerProcess
from tests.support.waiting import until


@on(DENSE, DENSE_TP2)
def test_everything_else_is_answered_at_once(
    served: Served, trainer: TrainerProcess, background: ThreadPoolExecutor
) -> None:
    """/state within 100 ms, the others 409, a second update after its wait; generation goes on."""
    server, pull_s = served.server, served.engine.long_pull_s
    served.restore(OLD)
    plan, version = trainer.connect(server.admin), served.next_version()
    trainer.signal(signal.SIGSTOP)
    pull = background.submit(served.update, plan, version)
    until(lambda: server.state()["state"] == "updating", otherwise=server.state)
    began, took, answers = time.monotonic(), list[float](), 0
    while time.monotonic() - began < pull_s or answers < 3:
        for _ in range(4):
            asked = time.monotonic()
            state = server.state()
            took.append(time.monotonic() - asked)
            assert (state["state"], state["update"]["phase"]) == ("updating", "pull")
        second = problem(served.update(plan, version + 1, timeout_s=0.5), 409, "illegal_state")
        assert f"the update to version {version} (pull; process " in second
        for route in ("/pause", "/resume", "/flush"):
            problem(server.admin.post(route), 409, "illegal_state")
        assert server.greedy(OLD.prompts()[0]) == OLD.expected()[0], "the old weights serve on"
        answers += 1
    trainer.signal(signal.SIGCONT)
    done = pull.result(30)
    assert done.status_code == 200, done.text
    assert done.json()["seconds"] > pull_s - 1
    assert NEW.wrong_answers(server.greedy) == []
    # A machine that stands still for a moment delays a call or two, a blocked server all.
    assert statistics.median(took) < 0.1, took
