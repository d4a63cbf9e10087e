"""The prefill gates of SGLang's ranks, each in front of a scheduler of its own."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.engine_server import TOKEN
from tests.support.live_models import LiveModel
from tests.support.sglang_server import sglang_server
from tests.support.streams import Stream

pytestmark = pytest.mark.engine

NO_ROOM = 1
"""A cap under what any engine holds."""


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
