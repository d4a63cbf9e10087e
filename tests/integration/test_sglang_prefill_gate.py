"""The prefill gates of SGLang's ranks, each in front of a scheduler of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.configurations import DENSE_TP2, OLD, on
from tests.support.engine_server import EngineServer
from tests.support.engines import SGLANG, only
from tests.support.served import Served
from tests.support.streams import Stream

pytestmark = [only(SGLANG), on(DENSE_TP2)]

NO_ROOM = 1
"""A cap under what any engine holds."""


@pytest.fixture
def server(served: Served) -> Iterator[EngineServer]:
    """The old weights serve behind a gate that sees no room; afterwards it is off."""
    served.restore(OLD)
    _configure(served.server, mode="enforce", cap_bytes=NO_ROOM)
    yield served.server
    _configure(served.server, mode="off", cap_bytes=None)


def _configure(server: EngineServer, **changes: object) -> None:
    server.admin.post("/prefill-gate/reset").raise_for_status()
    server.admin.patch("/prefill-gate", json=changes).raise_for_status()


def test_all_ranks_decide_alike(server: EngineServer) -> None:
    """What each logged of its decisions, which have figures in them that no other rank has read."""
    before = len(server.log.read_text())
    running = Stream(server, OLD.prompts()[0], 60)
    running.wait_for(3)
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(server.greedy, OLD.prompts()[:3]))
    assert said == OLD.expected()[:3]
    assert len(running.result()) == 60
    assert server.complete(range(2, 300), 4).status_code == 200
    assert server.oversized().status_code == 413
    decided: dict[str, list[str]] = {"TP0": [], "TP1": []}
    for line in server.log.read_text()[before:].splitlines():
        if found := re.search(r"(TP\d)\] prefill gate, mode enforce: (.*)", line):
            decided[found[1]].append(found[2])
    assert decided["TP0"]
    assert decided["TP0"] == decided["TP1"]
