"""SGLang as it comes: what we leave alone, and what it dies of that we do not."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import httpx
import pytest

from tests.support.live_models import LiveModel
from tests.support.sglang_server import sglang_server

pytestmark = pytest.mark.engine


def has_ended(pid: int, within_s: float) -> bool:
    """Whether a child of ours is gone in time."""
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(0.1)
    return False


def test_a_server_without_a_flag_of_ours_is_stock(tmp_path: Path) -> None:
    """No routes and no state; and an unmatched resume of its own ends it.

    Ours answers an unmatched resume with the state, see tests/contract/test_states.py.
    """
    model = LiveModel(kind="qwen3_live", version=0)
    folder = model.copy_to(tmp_path / "model")
    with sglang_server(folder, tmp_path / "log", preload=True) as server:
        assert server.admin.get("/state").status_code == 404
        assert not list(tmp_path.glob("engine-plugins-*")), "a runtime directory"
        assert model.wrong_answers(server.greedy) == []
        with contextlib.suppress(httpx.TransportError):
            server.http.post("/resume_memory_occupation", json={}, timeout=5)
        assert has_ended(server.pid, within_s=60)
        assert "Scheduler hit an exception" in server.log_tail(200)
