"""A vLLM engine that drafts tokens with prediction layers, fed by a trainer that has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engine_server import ROOT

pytestmark = pytest.mark.engine


def test_what_is_drafted_after_an_update_is_what_a_fresh_engine_drafts(tmp_path: Path) -> None:
    """Tokens alone would not show it: the target checks each draft, whatever it is worth.

    Back and forth, so that one update goes through the loader and others land directly.
    """
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.vllm_drafting", str(tmp_path)],
        env={**os.environ, **quiet},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["before"]["drafted"] != said["fresh"]["drafted"]
    assert said["after"] == [said["fresh"], said["before"], said["fresh"]]
    assert said["direct_bytes"][0] == 0 < said["direct_bytes"][-1]
