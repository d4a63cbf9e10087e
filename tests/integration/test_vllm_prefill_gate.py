"""Settings of vLLM's prefill gate that make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.gate_models import QUICK
from tests.support.vllm_server import vllm_server

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"PREFILL_GATE": "on"}, "PREFILL_GATE must be one of"),
        ({"PREFILL_CAP_BYTES": str(1 << 60)}, "PREFILL_CAP_BYTES is 1152921504606846976, above"),
    ],
    ids=["mode", "cap"],
)
def test_a_wrong_setting_fails_the_start(
    settings: dict[str, str], said: str, tmp_path: Path
) -> None:
    """In the words of the setting, whichever process is the first to see it."""
    log = tmp_path / "server.log"
    server = vllm_server(
        QUICK.copy_to(tmp_path / "model"),
        log,
        environment={
            "ENGINE_PLUGINS_PREFILL_GATE": "enforce",
            **{f"ENGINE_PLUGINS_{name}": value for name, value in settings.items()},
        },
        preload=True,
    )
    with pytest.raises(RuntimeError, match=r"did not come up \(exit code -?[1-9]"), server:
        pass
    assert said in log.read_text()
