"""How torch_memory_saver gets hold of allocations, chosen so that it does not end the process.

It has two hook modes, and takes `preload` where nothing is set. On GPUs of compute capability 10
and later preload was seen to crash with no traceback (CUDA 12.9), long after it was chosen. A
trainer asks here just before it sets the mode, so this module needs torch and nothing else:

    torch_memory_saver.hook_mode = choose_hook_mode()
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Literal, cast

import torch

from engine_plugins.errors import HookModeError, SettingsError
from engine_plugins.settings import HOOK_MODES, PREFIX, Settings
from engine_plugins.weights.hardware.expandable_segments import asked_for, named_in

__all__ = [
    "HookMode",
    "choose_hook_mode",
    "device_capability",
    "require_hook_mode_fits",
    "resolve_hook_mode",
    "why_graphs_stay",
]

logger = logging.getLogger(__name__)

HookMode = Literal["preload", "torch"]

_MODE, _ALLOW = PREFIX + "MEMORY_SAVER_HOOK_MODE", PREFIX + "ALLOW_PRELOAD_ON_BLACKWELL"
_FIRST_THAT_CRASHES = 10


def choose_hook_mode(
    asked: str | None = None,
    *,
    capability: tuple[int, int] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> HookMode:
    """The mode to set: the one asked for, or the one that suits these GPUs.

    Args:
        asked: the mode; `None` looks at `ENGINE_PLUGINS_MEMORY_SAVER_HOOK_MODE`.
        capability: compute capability of the newest GPU; `None` asks the devices.
        environ: where settings and those of torch's allocator are looked up.

    Raises:
        HookModeError: a RuntimeError; what was asked for would end this process.
        SettingsError: there is no such mode.
    """
    capability = capability or device_capability()
    mode = resolve_hook_mode(asked, environ)
    said = asked or Settings.load(environ=environ).memory_saver_hook_mode
    if not said and _crashes(mode, capability, environ):
        mode = "torch"
        logger.warning(
            "torch_memory_saver: hook mode torch, since preload crashes on compute capability %s",
            _dotted(capability),
        )
    require_hook_mode_fits(mode, capability=capability, environ=environ)
    if why := why_graphs_stay(mode):
        logger.warning("torch_memory_saver: %s", why)
    return mode


def resolve_hook_mode(
    asked: str | None = None, environ: Mapping[str, str] = os.environ
) -> HookMode:
    """The mode that torch_memory_saver would be in: unset means preload.

    Raises:
        SettingsError: there is no such mode.
    """
    mode = asked or Settings.load(environ=environ).memory_saver_hook_mode or "preload"
    if mode not in HOOK_MODES:
        raise SettingsError(
            f"torch_memory_saver has no hook mode {mode!r}",
            remedy=f"set {_MODE} to {' or '.join(HOOK_MODES)}",
        )
    return cast(HookMode, mode)


def require_hook_mode_fits(
    mode: HookMode,
    *,
    capability: tuple[int, int] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Refuse what would end this process later, and without a word.

    Raises:
        HookModeError: preload on GPUs where it crashes; expandable segments in any mode.
    """
    capability = capability or device_capability()
    if _crashes(mode, capability, environ):
        raise HookModeError(
            "torch_memory_saver in hook mode preload crashes, with no traceback, on GPUs of "
            f"compute capability {_FIRST_THAT_CRASHES}.0 and later; this one has "
            f"{_dotted(capability)}. Set {_MODE}=torch, or {_ALLOW}=1 where preload is known to "
            "work",
            remedy=f"{_MODE}=torch",
        )
    if expandable := named_in(environ) or asked_for(environ):
        raise HookModeError(
            f"torch_memory_saver cannot release memory of expandable segments, which {expandable} "
            "turns on; it would fail later, or keep the memory. Take expandable_segments out of "
            "PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF",
            remedy="start without expandable_segments",
        )


def why_graphs_stay(mode: HookMode) -> str | None:
    """Why the memory of CUDA graphs stays on the GPU through a sleep; `None` if it does not."""
    if mode == "preload":
        return None
    return (
        "CUDA graphs cannot be released in hook mode torch, which has no hook on their capture; "
        "their memory stays on the GPU through a sleep (up to gigabytes: capture fewer batch sizes)"
    )


def device_capability() -> tuple[int, int] | None:
    """Compute capability of the newest GPU that this process sees; `None` without one."""
    if not torch.cuda.is_available():
        return None
    return max(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))


def _crashes(
    mode: HookMode, capability: tuple[int, int] | None, environ: Mapping[str, str]
) -> bool:
    if mode != "preload" or capability is None or capability[0] < _FIRST_THAT_CRASHES:
        return False
    return not Settings.load(environ=environ).allow_preload_on_blackwell


def _dotted(capability: tuple[int, int] | None) -> str:
    return ".".join(map(str, capability or ()))
