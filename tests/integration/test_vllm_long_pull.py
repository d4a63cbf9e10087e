"""A pull of ten seconds hurries nobody: with one API server and with two.

The wire is tcp, where a stopped trainer really stalls a read.
"""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.conftest import StartServer
from tests.support.live_models import LiveModel
from tests.support.offers import MSGPACK
from tests.support.trainer_process import trainer_process

pytestmark = pytest.mark.engine

OLD, NEW = LiveModel(kind="qwen3_live", version=0), LiveModel(kind="qwen3_live", version=1)
PULL_S = 10.0


@pytest.mark.parametrize("api_servers", [1, 2])
def test_everything_else_is_answered_at_once(start_server: StartServer, api_servers: int) -> None:
    """/state within 100 ms, a second update and the others 409, generation goes on."""
    tcp = {"UCX_TLS": "tcp"}
    with (
        start_server(OLD, api_servers=api_servers, environment=tcp) as server,
        trainer_process(NEW.folder, **tcp) as trainer,
        ThreadPoolExecutor(1) as background,
    ):
        sources = server.admin.post("/weights/sources", content=trainer.manifest, headers=MSGPACK)
        ids = {"source_ids": [sources.json()["source_id"]]}
        plan = server.admin.post("/weights/connect", json=ids).json()["plan_id"]
        update = {"plan_id": plan, "version": 1}
        trainer.signal(signal.SIGSTOP)
        began = time.monotonic()
        pull = background.submit(server.admin.post, "/weights/update", json=update)
        while server.state()["state"] != "updating":
            assert time.monotonic() - began < 5, "the pull never began"
        took: list[float] = []
        while time.monotonic() - began < PULL_S:
            asked = time.monotonic()
            state = server.state()
            took.append(time.monotonic() - asked)
            assert (state["state"], state["update"]["phase"]) == ("updating", "pull")
            second = server.admin.post("/weights/update", json={**update, "version": 2})
            assert second.status_code == 409, second.text
            assert "the update to version 1 is under way" in second.json()["detail"]
            for route in ("/pause", "/resume", "/flush"):
                assert server.admin.post(route).status_code == 409
            assert server.greedy(OLD.prompts()[0]) == OLD.expected()[0], "the old weights serve on"
        trainer.signal(signal.SIGCONT)
        done = pull.result(30)
        assert done.status_code == 200, done.text
        assert done.json()["seconds"] > PULL_S - 1
        assert NEW.wrong_answers(server.greedy) == []
        # A machine that stands still for a moment delays a call or two, a blocked server all.
        assert len(took) >= 20
        assert sorted(took)[len(took) * 9 // 10] < 0.1, took
