"""SGLang's memory saver where sleep is configured, on SGLang's own arguments."""

from __future__ import annotations

import importlib
import logging
import os
from contextlib import nullcontext
from typing import Any

import pytest
from sglang.srt.arg_groups.arg_utils import record_fields
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.torch_memory_saver_adapter import _TorchMemorySaverAdapterReal

from engine_plugins.sleep import hook_mode
from sglang_ext import server_flags
from sglang_ext.memory_saver import preload_where_wanted, prepare_memory_saver, take_hook_mode

MODE, SLEEP = "ENGINE_PLUGINS_MEMORY_SAVER_HOOK_MODE", "ENGINE_PLUGINS_SLEEP"


@pytest.fixture(autouse=True)
def _settings_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only sleep is set; a mode that is chosen is gone after the test."""
    monkeypatch.setenv(SLEEP, "true")
    monkeypatch.setenv(MODE, "")


@pytest.fixture
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs on which preload crashes."""
    monkeypatch.setattr(hook_mode, "device_capability", lambda: (10, 0))


def arguments(device: str | None = "cuda") -> Any:
    """As the command line is read into them; nothing is derived yet."""
    return ServerArgs(model_path="m", device=device)


def test_on_a_gpu_the_memory_saver_is_on_before_anything_is_derived(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """SGLang derives from its arguments later, and takes no change from then on."""
    made = arguments()
    before = values(made)
    prepare_memory_saver(made)
    assert made.enable_memory_saver is True
    assert "CUDA graphs are not released" in caplog.text
    changed = {name for name, value in values(made).items() if before[name] != value}
    assert changed == {"enable_memory_saver"}
    prepare_memory_saver(made)
    assert made.enable_memory_saver is True
    assert os.environ[MODE] == "preload"


def values(made: Any) -> dict[str, Any]:
    return {field.name: getattr(made, field.name) for field in record_fields(type(made))}


@pytest.mark.parametrize("device", ["cpu", None])
def test_on_the_cpu_it_stays_off(device: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """Said or found: it needs libcuda. No mode is chosen."""
    made = arguments(device)
    with caplog.at_level(logging.INFO, logger="engine_plugins"):
        prepare_memory_saver(made)
    assert made.enable_memory_saver is False
    assert os.environ[MODE] == ""
    assert any("enable_memory_saver stays off on the CPU" in said for said in caplog.messages)


def test_without_sleep_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SLEEP, "false")
    made = arguments()
    before = values(made)
    prepare_memory_saver(made)
    assert values(made) == before
    assert os.environ[MODE] == ""


@pytest.mark.usefixtures("blackwell")
def test_schedulers_start_without_preload_where_it_crashes() -> None:
    """Every process reads the mode that the first one chose."""
    prepare_memory_saver(arguments())
    assert os.environ[MODE] == "torch"
    before = os.environ.get("LD_PRELOAD")
    adapter = _TorchMemorySaverAdapterReal()
    with preload_where_wanted(_TorchMemorySaverAdapterReal.configure_subprocess, adapter):
        assert os.environ.get("LD_PRELOAD") == before


def test_elsewhere_sglang_preloads_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own function, which looks for CUDA's runtime."""
    monkeypatch.setenv(MODE, "preload")
    adapter = object()
    around = preload_where_wanted(lambda given: nullcontext(given), adapter)
    with around as given:
        assert given is adapter


@pytest.mark.parametrize(
    ("mode", "taken"), [("torch", {"hook_mode": "torch"}), ("preload", {}), ("", {})]
)
def test_a_scheduler_takes_the_mode_that_was_chosen(
    mode: str, taken: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first region; preload is what the library takes by itself."""
    library = importlib.import_module("torch_memory_saver").torch_memory_saver
    monkeypatch.setattr(library, "_impl_ctor_kwargs", {})
    monkeypatch.setenv(MODE, mode)
    take_hook_mode()
    assert library._impl_ctor_kwargs == taken


@pytest.mark.usefixtures("blackwell")
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (MODE, "preload", "crashes"),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True", "expandable_segments"),
        ("SGLANG_MEMORY_SAVER_CUDA_GRAPH", "1", "CUDA graphs"),
    ],
)
def test_a_start_that_would_end_later_ends_with_a_line(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with any flag that cannot be served."""
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(server_flags, "_check_release", lambda: None)
    with pytest.raises(SystemExit, match="engine-plugins: error:") as ended:
        server_flags.prepare_server_args(lambda rest: arguments(), ["--engine-plugins-enable"])
    assert said in str(ended.value)
