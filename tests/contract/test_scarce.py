"""A server that runs out of something in the middle of an update: real engines, really out of it.

The one in memory shares its process with the test; tests/unit/admin/test_scarce_machine.py has it.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests.support.configurations import DENSE_TP2, NEW, OLD, on
from tests.support.engines import only, real_engines_here
from tests.support.served import Served
from tests.support.stepping import Steps
from tests.support.waiting import until

pytestmark = [on(DENSE_TP2), only(*real_engines_here())]

HALF_WAY = 12
Shortage = Callable[[Served], AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def healthy(served: Served) -> Iterator[None]:
    served.restore(OLD)
    yield
    served.restore(OLD)


@contextmanager
def no_runtime_dir(served: Served) -> Iterator[None]:
    """Its path leads nowhere, as after a cleaner of temporary folders."""
    (folder,) = served.server.log.parent.glob("engine-plugins-*")
    away = folder.with_name("away")
    folder.rename(away)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        away.rename(folder)


@contextmanager
def no_descriptors(served: Served) -> Iterator[None]:
    """The first process may open nothing more."""
    pid = served.server.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(each) for each in os.listdir(f"/proc/{pid}/fd")}
    free = next(number for number in range(len(used) + 1) if number not in used)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("shortage", [no_runtime_dir, no_descriptors])
def test_an_update_that_is_being_installed_ends_well(
    served: Served, steps: Steps, background: ThreadPoolExecutor, shortage: Shortage
) -> None:
    """It is installed, and said to be; the label is right, and the next update works."""
    server = served.server
    plan = served.offer(NEW).connect().json()["plan_id"]
    version = served.next_version()
    hold = steps.hold(rank=0, module=HALF_WAY)
    update = background.submit(
        served.update,
        plan,
        version,
        timeout_s=60.0,
        mode="in_place",
        request_id=f"scarce-{version}",
    )
    until(
        lambda: (server.state()["update"] or {}).get("phase") == "install",
        otherwise=server.state,
    )
    with shortage(served):
        hold.unlink()
        answer = update.result(60)
        assert answer.status_code == 200, answer.text
    state = server.state()
    assert (state["state"], state["weights"]["version"]) == ("serving", version)
    assert NEW.wrong_answers(server.greedy) == []
    again = served.update(plan, version, request_id=f"scarce-{version}", mode="in_place")
    assert again.json() == answer.json()
    assert served.update(plan).status_code == 200


def test_a_server_whose_directory_is_gone_takes_a_new_trainer(served: Served) -> None:
    """Its source has vanished with the directory: it is sent again, and everything works."""
    offer = served.offer(NEW)
    with no_runtime_dir(served):
        answer = offer.update(served.next_version())
        assert answer.status_code == 200, answer.text
        assert NEW.wrong_answers(served.server.greedy) == []
