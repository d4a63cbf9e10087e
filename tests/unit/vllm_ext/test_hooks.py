"""Our hooks in vLLM: none may keep a server from starting that did not ask for us."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.core import EngineCore

from engine_plugins.admin.absent_parts import absent_parts
from engine_plugins.admin.runtime_dir import RUNTIME_DIR, ensure_runtime_dir
from engine_plugins.engine_release import EngineNames, EngineRelease
from engine_plugins.errors import EngineCallError, SettingsError, UnsupportedError
from engine_plugins.prefill_gate.engine_gate import calibration_file
from engine_plugins.prefill_gate.gate_report import GateReport
from engine_plugins.settings import Settings
from engine_plugins.weights.receiving.worker_messages import encode_call, read_answer
from tests.support.megatron_hf import dense_config
from tests.unit.vllm_ext.test_kv_scales import SERVED
from vllm_ext import asked, core_hooks, engine_arguments, hooks
from vllm_ext.memory_baseline import hook_load_model
from vllm_ext.plugin import watch_arguments
from vllm_ext.versions import VLLM

OURS = "vllm_ext.worker_extension.EnginePluginsWorkerExtension"
GATE_SETTING = "ENGINE_PLUGINS_PREFILL_GATE"


@pytest.fixture(autouse=True)
def _watched(as_before: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_lost", {})
    for name in [each for each in os.environ if each.startswith("ENGINE_PLUGINS")]:
        del os.environ[name]
    watch_arguments()


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    """A model that can be configured, without weights."""
    served = {key: value for key, value in SERVED.items() if key != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps({**dense_config(), **served}))
    return {"model": str(tmp_path), "skip_tokenizer_init": True, "max_model_len": 64}


@pytest.fixture
def another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose scheduler takes other arguments than the gate is made for."""
    gate = {"vllm.v1.core.sched.scheduler": ("Scheduler.add_request(self, request, soon)",)}
    names = {**VLLM.names, "the prefill gate": EngineNames(hooked=gate, used={})}
    monkeypatch.setattr(engine_arguments, "VLLM", _release(names))


def _release(names: Any) -> EngineRelease:
    return EngineRelease(
        engine="vLLM", package="vllm", version="0.99", probed=("0.32",), names=names
    )


def _no_such_hook() -> None:
    raise AttributeError("EngineCore has no such method")


def test_a_hook_that_fails_ends_only_servers_with_our_extension(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises: the other servers of the environment know nothing of us."""
    monkeypatch.setattr(sys.modules[__name__], "hook_nothing", _no_such_hook, raising=False)
    hooks.install(__name__, "hook_nothing", needed=False)
    hooks.require_installed()
    hooks.install(__name__, "hook_nothing")
    AsyncEngineArgs(**arguments).create_engine_config()
    with pytest.raises(UnsupportedError, match="hook_nothing: AttributeError: EngineCore has no"):
        AsyncEngineArgs(**arguments, worker_extension_cls=OURS).create_engine_config()


def test_a_release_that_does_not_fit_updates_is_refused_with_our_extension(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, before anything is loaded."""
    used = {"vllm.v1.engine.core": ("EngineCoreProc._send_finish_outputs(self)",)}
    names = {**VLLM.names, "weight updates": EngineNames(hooked={}, used=used)}
    monkeypatch.setattr(engine_arguments, "VLLM", _release(names))
    AsyncEngineArgs(**arguments).create_engine_config()
    with pytest.raises(
        UnsupportedError,
        match=r"^vLLM 0\.99 has no vllm\.v1\.engine\.core\.EngineCoreProc\._send_finish_outputs"
        r"\(self\), which engine-plugins needs for weight updates: vLLM 0\.32 has it\n"
        r"engine-plugins: use vLLM 0\.32, or a newer engine-plugins$",
    ):
        AsyncEngineArgs(**arguments, worker_extension_cls=OURS).create_engine_config()


@pytest.mark.usefixtures("another_release")
@pytest.mark.parametrize("extension", ["", OURS])
def test_a_release_that_does_not_fit_the_gate_is_refused_with_the_gate(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, extension: str
) -> None:
    """With our extension or without; and where the gate is off the server starts."""
    arguments["worker_extension_cls"] = extension
    AsyncEngineArgs(**arguments).create_engine_config()
    monkeypatch.setenv(GATE_SETTING, "observe")
    with pytest.raises(UnsupportedError, match=r"has .*add_request\(self, request\), not .*soon"):
        AsyncEngineArgs(**arguments).create_engine_config()


def test_bad_settings_end_only_servers_that_asked_for_us(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be in the environment for another server."""
    monkeypatch.setenv(GATE_SETTING, "perhaps")
    AsyncEngineArgs(**arguments).create_engine_config()
    with pytest.raises(SettingsError, match="PREFILL_GATE must be one of"):
        AsyncEngineArgs(**arguments, worker_extension_cls=OURS).create_engine_config()


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        (OURS, True),
        (f"{__name__}.Extended", True),
        ("pathlib.Path", False),
        ("no.such.Class", False),
        ("", False),
        (None, False),
    ],
)
def test_our_extension_is_known_by_its_method(name: str | None, *, ours: bool) -> None:
    """Another server's extension is none of ours, and may be misspelt."""
    assert asked.has_extension(name) == ours


class Extended:
    """A class of a user's, made of our extension."""

    def engine_plugins_call(self) -> None: ...


@pytest.mark.parametrize("of_ours", [False, True])
def test_a_worker_whose_memory_cannot_be_measured_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, of_ours: bool
) -> None:
    """The State tells it; of a worker without our extension nothing is measured."""
    from vllm.v1.worker.gpu_worker import Worker

    loaded = []
    monkeypatch.setattr(Worker, "load_model", lambda self, *, dummy: loaded.append(dummy))
    hook_load_model()
    monkeypatch.setenv(RUNTIME_DIR, str(tmp_path))
    worker = type("AnyWorker", (Extended,) if of_ours else (), {"rank": 0})()  # and no device
    Worker.load_model(worker, dummy=True)
    assert loaded == [True]
    assert not hasattr(worker, "_engine_plugins_memory")
    assert list(absent_parts(tmp_path)) == (["memory_baseline"] if of_ours else [])


def test_a_gate_that_cannot_be_made_is_told_to_who_turns_it_on() -> None:
    """A core without one serves all the same."""
    core = _core(prefill_gate="off")
    assert not vars(core).keys() & {"_engine_plugins_gate"}
    refused = core.engine_plugins_gate_call("gate_configure", _changes(mode="observe"))
    with pytest.raises(EngineCallError, match="AttributeError"):
        read_answer(refused, GateReport)
    assert _told(core).settings.mode == "off"


@pytest.mark.usefixtures("another_release")
def test_a_core_of_another_release_is_not_touched_by_the_gate(arguments: dict[str, Any]) -> None:
    """The first process has found that it does not fit."""
    AsyncEngineArgs(**arguments, worker_extension_cls=OURS).create_engine_config()
    core = _core(prefill_gate="off")
    refused = core.engine_plugins_gate_call("gate_configure", _changes(mode="observe"))
    with pytest.raises(UnsupportedError, match=r"add_request\(self, request\), not .*, soon\)"):
        read_answer(refused, GateReport)


def test_settings_of_a_gate_that_is_off_are_kept_until_it_is_made() -> None:
    """Checked as ever, and nothing is made for them."""
    core = _core(prefill_gate="off")
    for wrong in ({"margin_quantile": 2.0}, {"cap_bytes": 1 << 60}):
        with pytest.raises(SettingsError):
            read_answer(core.engine_plugins_gate_call("gate_configure", _changes(**wrong)), Any)
    core.engine_plugins_gate_call("gate_configure", _changes(margin_bytes=5))
    assert _told(core).settings.margin_bytes == 5


def _core(**settings: Any) -> Any:
    """A core of which nothing is there but its configuration."""
    ensure_runtime_dir()
    core_hooks.hook_engine_core()
    core: Any = object.__new__(EngineCore)
    core.vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(worker_extension_cls=OURS),
        additional_config={"engine_plugins": settings},
    )
    return core


def _changes(**changes: Any) -> bytes:
    return encode_call(changes=changes)


def _told(core: Any) -> GateReport:
    return read_answer(core.engine_plugins_gate_call("gate_report", encode_call()), GateReport)


def test_without_a_home_the_gate_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A user id that no table knows has no folder; a configured one is enough."""
    monkeypatch.setattr(Path, "home", _homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    key: Any = None
    with pytest.raises(UnsupportedError, match="no folder for its measurements"):
        calibration_file(Settings(), key)
    configured = Settings(prefill_calibration_dir=tmp_path)
    assert calibration_file(configured, key).path.parent == tmp_path


def _homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")
