"""SGLang's description: all that we rely on is in it, and in the release that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sglang_ext
from engine_plugins.admin.runtime_dir import RUNTIME_DIR
from engine_plugins.engine_release import GATE, UPDATES
from engine_plugins.engine_sources import EngineSources
from sglang_ext import gate_hooks, process_hooks
from sglang_ext.versions import SGLANG
from tests.support.engine_names import EngineCode

SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
MANAGER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"
RUNNER = "sglang.srt.model_executor.model_runner:ModelRunner"
WORKER = "sglang.srt.managers.tp_worker:TpModelWorker"
BATCH = "sglang.srt.managers.schedule_batch:ScheduleBatch"
REQUEST = "sglang.srt.managers.schedule_batch:Req"
ASKED = "sglang.srt.managers.io_struct:GenerateReqInput"
TOKENIZED = "sglang.srt.managers.io_struct:TokenizedGenerateReqInput"
GRAMMARS = "sglang.srt.constrained.grammar_manager:GrammarManager"
CACHE = "sglang.srt.mem_cache.base_prefix_cache:BasePrefixCache"
MODEL = "sglang.srt.configs.model_config:ModelConfig"
ENVIRONMENT = "sglang.srt.environ:Envs"
_FIELDS = "sglang.srt.arg_groups.fields"
ARGUMENTS = " ".join(
    f"{_FIELDS}.{each}"
    for each in (
        "device:Device",
        "disagg:Disagg",
        "exec_:ExecFeatures",
        "exec_:ExecKernel",
        "lora:Lora",
        "memory:Memory",
        "mm:Mm",
        "model:Model",
        "parallel:Parallel",
        "serving:Serving",
    )
)
UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater"

CODE = EngineCode(
    folder="sglang_ext",
    release=SGLANG,
    objects={
        "*": {
            "scheduler": SCHEDULER,
            "self._scheduler": SCHEDULER,
            "scheduler.tp_worker": WORKER,
            "self._scheduler.tp_worker": WORKER,
            "scheduler.grammar_manager": GRAMMARS,
            "self._scheduler.grammar_manager": GRAMMARS,
            "scheduler.running_batch": BATCH,
            "scheduler.model_config": MODEL,
            "scheduler.server_args": ARGUMENTS,
            "scheduler.tree_cache": CACHE,
            "scheduler.policy": "sglang.srt.managers.schedule_policy:SchedulePolicy",
            "scheduler.beam_coordinator": "sglang.srt.beam_search.coordinator:BeamCoordinator",
            "scheduler.spec_algorithm": "sglang.srt.speculative.spec_info:SpeculativeAlgorithm",
            "grammars": GRAMMARS,
            "cache": CACHE,
            "manager": MANAGER,
            "tokenizer_manager": MANAGER,
            "self._manager": MANAGER,
            "self._manager.model_update_lock": "sglang.srt.utils.aio_rwlock:RWLock",
            "self._manager.mm_processor": "sglang.srt.multimodal.processors.base_processor"
            ":BaseMultimodalProcessor",
            "tokenizer_manager.model_config": MODEL,
            "runner": RUNNER,
            "model_runner": RUNNER,
            "self._runner": RUNNER,
            "self._runner.model_config": MODEL,
            "self._runner.weight_updater": UPDATER,
            "runner.server_args": ARGUMENTS,
            "server_args": ARGUMENTS,
            "arguments": ARGUMENTS,
            "batch": BATCH,
            "running_batch": BATCH,
            "self._running": BATCH,
            "request": f"{REQUEST} {TOKENIZED}",
            "request.kv": "sglang.srt.managers.schedule_batch:ReqKvInfo",
            "envs": ENVIRONMENT,
        },
        "admin_mount.py": {"state": "sglang.srt.entrypoints.http_server:_GlobalState"},
        "admission_hook.py": {"request": ASKED, "tokenized": TOKENIZED},
        "loader_model.py": {"config": MODEL},
        "own_token.py": {"request": ""},
        "prefill_gate.py": {"config": MODEL},
        "scheduler_extension.py": {"request": ""},  # a message of ours
        "step_hook.py": {"each": REQUEST},
        "unasked_steps.py": {"each": REQUEST, "scheduler.chunked_req": REQUEST},
        "weight_installer.py": {
            "config": "",  # a model's own
            "self._sessions": "sglang.srt.managers.scheduler_components.weight_updater"
            ":SchedulerWeightUpdaterManager",
        },
    },
)
BOTH = (UPDATES, GATE)
PARTS = {
    "*": (UPDATES,),
    "admission_hook.py": BOTH,
    "prefill_gate.py": BOTH,
    "prefill_hook.py": BOTH,
    "prefill_shapes.py": BOTH,
    "step_hook.py": BOTH,
    "unasked_steps.py": BOTH,
}


class _Anything:
    """In place of our modules: only where their functions go is looked at here."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self) -> None:
        pass


@pytest.mark.parametrize("part", BOTH)
def test_the_installed_release_has_it_all(part: str) -> None:
    """Every name with the signature that we need."""
    assert SGLANG.differences(part, EngineSources.installed("sglang")) == []


def test_every_name_is_listed() -> None:
    """What only the gate's files rely on may be in its part alone."""
    assert CODE.unlisted(parts=PARTS) == []


def test_every_hook_is_listed_in_the_part_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A hook of the gate must not be asked of a server whose gate is off."""
    monkeypatch.setenv(RUNTIME_DIR, str(tmp_path))
    installed: dict[str, set[str]] = {UPDATES: set(), GATE: set()}

    def install(target: str, kind: Any, function: Any, *, part: str = UPDATES) -> None:
        installed[part].add(target)

    for module in Path(str(sglang_ext.__file__)).parent.glob("*.py"):
        if module.stem not in ("process_hooks", "gate_hooks"):
            monkeypatch.setattr(sglang_ext, module.stem, _Anything(), raising=False)
    for module_of_hooks in (process_hooks, gate_hooks):
        monkeypatch.setattr(module_of_hooks, "install", install)
    process_hooks.hook_first_process()
    process_hooks.hook_scheduler()
    gate_hooks.hook_gate()
    for part, targets in installed.items():
        hooked = {f"{module}.{path}" for module, path, _, hook in SGLANG.names[part] if hook}
        assert targets == hooked
