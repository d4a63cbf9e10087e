"""Settings of vLLM's prefill gate that make no sense."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engine_server import ROOT, TOKEN
from tests.support.gate_models import QUICK
from tests.support.vllm_server import QUIET

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"PREFILL_GATE": "on"}, "PREFILL_GATE must be one of"),
        ({"PREFILL_MARGIN_BYTES": "-1"}, "PREFILL_MARGIN_BYTES must not be negative"),
        ({"PREFILL_CAP_BYTES": str(1 << 60)}, "PREFILL_CAP_BYTES is 1152921504606846976, above"),
    ],
    ids=["mode", "margin", "cap"],
)
def test_a_wrong_setting_fails_the_start(
    settings: dict[str, str], said: str, tmp_path: Path
) -> None:
    """In the words of the setting, whichever process is the first to see it."""
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("vllm")), "serve"),
            *(str(QUICK.copy_to(tmp_path / "model")), "--port", "0", "--dtype", "float32"),
            *("--enforce-eager", "--skip-tokenizer-init", "--kv-cache-memory-bytes", "64M"),
            *("--worker-extension-cls", "vllm_ext.worker_extension.EnginePluginsWorkerExtension"),
        ],
        cwd=ROOT,
        env={
            **_environment(tmp_path),
            "ENGINE_PLUGINS_PREFILL_GATE": "enforce",
            **{f"ENGINE_PLUGINS_{name}": value for name, value in settings.items()},
        },
        capture_output=True,
        text=True,
        timeout=240,
        process_group=0,
    )
    assert done.returncode != 0
    assert said in done.stdout + done.stderr


def _environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        **QUIET,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder),
        "ENGINE_PLUGINS_ADMIN_TOKEN": TOKEN,
    }
