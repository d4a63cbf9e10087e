"""Starts of vLLM that are refused, by what the server says as it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.live_models import LiveModel
from tests.support.vllm_server import vllm_server

pytestmark = pytest.mark.engine

SECRET = "t0ken-on-a-command-line"


def test_a_token_in_additional_config_ends_the_start(tmp_path: Path) -> None:
    """VLLM has logged its arguments by then: we do not repeat the token, and say to replace it."""
    model = LiveModel(kind="qwen3_live", version=0).copy_to(tmp_path / "model")
    log = tmp_path / "log"
    config = json.dumps({"engine_plugins": {"admin_token": SECRET}})
    server = vllm_server(model, log, arguments=["--additional-config", config], preload=True)
    with pytest.raises(RuntimeError, match=r"did not come up \(exit code [1-9]"), server:
        pass
    said = log.read_text(errors="replace").splitlines()
    leaked = [line for line in said if SECRET in line]
    assert all("non-default args" in line for line in leaked), "vLLM's own log, and nothing else"
    assert "admin_token is in the engine's configuration" in "\n".join(said[-20:])
    (remedy,) = [line for line in said if "engine-plugins: take it out" in line]
    assert "choose a new one" in remedy
    assert "ENGINE_PLUGINS_ADMIN_TOKEN or ENGINE_PLUGINS_ADMIN_TOKEN_FILE" in remedy
