"""The hook mode of torch_memory_saver: what would end the process is refused before."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_plugins.errors import EnginePluginError, HookModeError, SettingsError
from engine_plugins.sleep import hook_mode
from engine_plugins.sleep.hook_mode import (
    HookMode,
    choose_hook_mode,
    device_capability,
    require_hook_mode_fits,
    resolve_hook_mode,
    why_graphs_stay,
)
from tests.support.after_import import run_after_import

MODE = "ENGINE_PLUGINS_MEMORY_SAVER_HOOK_MODE"
ALLOW = "ENGINE_PLUGINS_ALLOW_PRELOAD_ON_BLACKWELL"
ADA, HOPPER, BLACKWELL, RTX_50 = (8, 9), (9, 0), (10, 0), (12, 0)
ON = "expandable_segments:True"


@pytest.mark.parametrize(
    ("asked", "environ", "mode"),
    [
        (None, {}, "preload"),
        (None, {MODE: ""}, "preload"),
        (None, {MODE: "torch"}, "torch"),
        (None, {MODE: "preload"}, "preload"),
        ("torch", {MODE: "preload"}, "torch"),
        ("preload", {}, "preload"),
    ],
)
def test_the_resolved_mode_is_what_the_library_would_take(
    asked: str | None, environ: dict[str, str], mode: HookMode
) -> None:
    """Unset means preload there."""
    assert resolve_hook_mode(asked, environ) == mode


@pytest.mark.parametrize(("asked", "environ"), [("ptrace", {}), (None, {MODE: "Torch"})])
def test_a_mode_that_does_not_exist_is_refused(asked: str | None, environ: dict[str, str]) -> None:
    """With those that do."""
    with pytest.raises(SettingsError, match=f"{asked or 'Torch'}"):
        resolve_hook_mode(asked, environ)


@pytest.mark.parametrize("capability", [BLACKWELL, (10, 3), RTX_50])
def test_preload_is_refused_where_it_crashes(capability: tuple[int, int]) -> None:
    """By a RuntimeError of our tree that says what was seen and what to set."""
    with pytest.raises(HookModeError) as refused:
        require_hook_mode_fits("preload", capability=capability, environ={})
    assert isinstance(refused.value, RuntimeError)
    assert isinstance(refused.value, EnginePluginError)
    for said in (".".join(map(str, capability)), "preload", f"{MODE}=torch", f"{ALLOW}=1"):
        assert said in str(refused.value)


@pytest.mark.parametrize(
    ("mode", "capability", "environ"),
    [
        ("preload", ADA, {}),
        ("preload", HOPPER, {}),
        ("torch", BLACKWELL, {}),
        ("torch", RTX_50, {}),
        ("preload", BLACKWELL, {ALLOW: "1"}),
        ("preload", RTX_50, {ALLOW: "true"}),
    ],
)
def test_what_is_known_to_work_passes(
    mode: HookMode, capability: tuple[int, int], environ: dict[str, str]
) -> None:
    """Older GPUs keep preload, the mode that releases more; the hatch opens for those who know."""
    require_hook_mode_fits(mode, capability=capability, environ=environ)


@pytest.mark.parametrize("value", ["0", "false"])
def test_a_hatch_that_is_shut_stays_shut(value: str) -> None:
    with pytest.raises(HookModeError):
        require_hook_mode_fits("preload", capability=BLACKWELL, environ={ALLOW: value})


@pytest.mark.parametrize("mode", ["preload", "torch"])
@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_are_refused_under_either_name(mode: HookMode, name: str) -> None:
    """The library looks at the first name only, and only for one spelling."""
    for value in (ON, f"max_split_size_mb:64, {ON}"):
        with pytest.raises(HookModeError, match=name):
            require_hook_mode_fits(mode, capability=HOPPER, environ={name: value})
    require_hook_mode_fits(mode, environ={name: "expandable_segments:False"})


def test_expandable_segments_are_refused_where_a_program_turned_them_on() -> None:
    """No variable says so then: torch's allocator does."""
    ((refused, _),) = run_after_import(choose_with_expandable_segments, [({}, [])])
    assert "a setting made at run time" in refused


def choose_with_expandable_segments() -> str | None:
    torch._C._accelerator_setAllocatorSettings(ON)
    try:
        return choose_hook_mode()
    except HookModeError as error:
        return error.message


@pytest.mark.parametrize(
    ("asked", "capability", "environ", "mode"),
    [
        (None, HOPPER, {}, "preload"),
        (None, BLACKWELL, {}, "torch"),
        (None, RTX_50, {MODE: ""}, "torch"),
        (None, BLACKWELL, {ALLOW: "1"}, "preload"),
        (None, HOPPER, {MODE: "torch"}, "torch"),
        ("torch", BLACKWELL, {}, "torch"),
        ("preload", HOPPER, {}, "preload"),
    ],
)
def test_torch_is_chosen_where_nothing_was_said_and_preload_would_crash(
    asked: str | None,
    capability: tuple[int, int],
    environ: dict[str, str],
    mode: HookMode,
) -> None:
    """And only there."""
    assert choose_hook_mode(asked, capability=capability, environ=environ) == mode


@pytest.mark.parametrize(("asked", "environ"), [("preload", {}), (None, {MODE: "preload"})])
def test_a_mode_that_was_said_is_never_changed(asked: str | None, environ: dict[str, str]) -> None:
    """It is refused, and the user decides."""
    with pytest.raises(HookModeError):
        choose_hook_mode(asked, capability=BLACKWELL, environ=environ)


def test_the_choice_and_its_price_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """CUDA graphs are released in preload only."""
    with caplog.at_level(logging.WARNING):
        choose_hook_mode(capability=HOPPER, environ={})
        assert not caplog.messages
        choose_hook_mode(capability=BLACKWELL, environ={})
    chosen, graphs = caplog.messages
    assert "hook mode torch" in chosen
    assert "10.0" in chosen
    assert "CUDA graphs cannot be released in hook mode torch" in graphs
    assert why_graphs_stay("preload") is None


def test_the_devices_of_this_process_are_asked() -> None:
    """Without one there is nothing that could crash."""
    if not torch.cuda.is_available():
        assert device_capability() is None
        assert choose_hook_mode(environ={}) == "preload"
    else:
        assert device_capability() is not None


def test_the_guard_holds_without_assertions() -> None:
    """`python -O` compiles the module so; that torch is compiled anew as well takes 8 s."""
    source = Path(hook_mode.__file__).read_text() + "\nassert False\n"
    optimized: dict[str, Any] = {"__name__": hook_mode.__name__}
    exec(compile(source, hook_mode.__file__, "exec", optimize=1), optimized)
    with pytest.raises(HookModeError):
        optimized["require_hook_mode_fits"]("preload", capability=BLACKWELL, environ={})


def test_a_trainer_that_asks_loads_nothing_but_torch() -> None:
    """Neither an engine, nor a web framework, nor the memory saver itself."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import engine_plugins.sleep.hook_mode\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert loaded.split() == ["engine_plugins"]
