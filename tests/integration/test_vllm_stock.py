"""vLLM as it comes, in an environment where we are installed: nothing of ours runs in it.

And with our extension: of the prefill gate there is nothing until it is turned on.
"""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from engine_plugins.engine_release import GATE
from tests.support.configurations import OLD
from tests.support.looked_into import FOLDER, look_into
from tests.support.vllm_server import EXTENSION, vllm_server
from vllm_ext.versions import VLLM

pytestmark = pytest.mark.engine

WATCHED = "vllm.engine.arg_utils.EngineArgs.create_engine_config"
ADDED = "vllm.v1.engine.core.EngineCore.preprocess_add_request"
OF_THE_GATE = {f"{module}.{path}" for module, path, _, hook in VLLM.names[GATE] if hook}


@pytest.mark.parametrize("ours", [False, True])
def test_only_what_was_asked_for_is_there(tmp_path: Path, ours: bool) -> None:
    with vllm_server(
        OLD.copy_to(tmp_path / "model"),
        tmp_path / "log",
        extension=EXTENSION if ours else "",
        launcher="tests.support.looked_into_vllm",
        environment={FOLDER: str(tmp_path), "ENGINE_PLUGINS_STALL_TIMEOUT_S": "7"},
        preload=True,
    ) as server:
        assert OLD.wrong_answers(server.greedy) == []
        told = look_into(server.pid, tmp_path, sorted(VLLM.hooked))
        api, engine = told.pop(str(server.pid)), list(told.values())  # the core, and workers of it
        assert engine
        assert WATCHED in api["hooked"]
        if not ours:
            assert (api["modules"], api["hooked"]) == ([], [WATCHED])
            assert all(each == {"modules": [], "hooked": []} for each in engine)
            assert not list(tmp_path.glob("engine-plugins-*")), "a runtime directory"
            assert httpx.get(f"{server.url}/admin/v1/state").status_code == 404
            return
        assert any(ADDED in each["hooked"] for each in engine)
        for each in (api, *engine):
            assert not OF_THE_GATE & {*each["hooked"]}
            assert "vllm_ext.scheduler_hook" not in each["modules"]
        assert server.admin.get("/state").json()["absent"] == []
        server.admin.patch("/prefill-gate", json={"mode": "observe"}).raise_for_status()
        assert OLD.wrong_answers(server.greedy) == []
        told = look_into(server.pid, tmp_path, sorted(VLLM.hooked))
        assert "vllm.v1.worker.gpu_worker.Worker.execute_model" in {
            name for each in told.values() for name in each["hooked"]
        }
