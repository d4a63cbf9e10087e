"""SGLang's memory saver: on where sleep is configured, and in a hook mode that these GPUs survive.

SGLang takes torch_memory_saver's default mode, preload, and loads it into every scheduler that it
starts. Patch: in mode torch nothing is preloaded. Remove when SGLang lets the mode be chosen.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.utils import is_cpu

from engine_plugins.admin.absent_parts import note_absent
from engine_plugins.errors import HookModeError, SettingsError
from engine_plugins.settings import PREFIX, Settings
from engine_plugins.sleep.hook_mode import choose_hook_mode
from engine_plugins.sleep.memory_saver import load_memory_saver
from engine_plugins.sleep.time_sharing import force_memory_saver

__all__ = [
    "is_on_cpu",
    "preload_where_wanted",
    "prepare_memory_saver",
    "require_memory_saver",
    "settle_hook_mode",
    "take_hook_mode",
]

logger = logging.getLogger(__name__)

_MODE = PREFIX + "MEMORY_SAVER_HOOK_MODE"


def is_on_cpu(arguments: Any) -> bool:
    """Whether a server's ranks compute on the CPU."""
    return arguments.device == "cpu" or (arguments.device is None and is_cpu())


def prepare_memory_saver(arguments: Any) -> None:
    """Have the saver on where sleep is configured, and its mode settled.

    Raises:
        HookModeError: see `settle_hook_mode`.
    """
    on_cpu = is_on_cpu(arguments)
    force_memory_saver(arguments, "enable_memory_saver", Settings.load(), on_cpu=on_cpu)
    settle_hook_mode(arguments)


def require_memory_saver(arguments: Any) -> None:
    """Refuse a start without the saver where sleep is configured.

    Raises:
        SettingsError: it is off.
    """
    if Settings.load().sleep and not is_on_cpu(arguments) and not arguments.enable_memory_saver:
        raise SettingsError(
            f"{PREFIX}SLEEP asks for a memory saver, and these server arguments leave it off",
            remedy="start with ServerArgs(enable_memory_saver=True)",
        )


def settle_hook_mode(arguments: Any) -> None:
    """In the process that starts the engine: the saver's mode, for all processes.

    Raises:
        HookModeError: the mode would end the schedulers, or their start.
    """
    if is_on_cpu(arguments) or not arguments.enable_memory_saver:
        return
    os.environ[_MODE] = mode = choose_hook_mode()
    if mode == "torch" and envs.SGLANG_MEMORY_SAVER_CUDA_GRAPH.get():
        raise HookModeError(
            "SGLANG_MEMORY_SAVER_CUDA_GRAPH asks for CUDA graphs that can be released, and "
            "torch_memory_saver cannot capture them in hook mode torch",
            remedy="unset SGLANG_MEMORY_SAVER_CUDA_GRAPH",
        )
    if mode == "preload" and not envs.SGLANG_MEMORY_SAVER_CUDA_GRAPH.get():
        logger.warning(
            "CUDA graphs are not released: their memory stays on the GPU through a sleep, unless "
            "SGLANG_MEMORY_SAVER_CUDA_GRAPH=1 has SGLang capture them in the memory saver"
        )


def take_hook_mode() -> None:
    """In a scheduler, before it makes a region: the mode that the first process chose."""
    if Settings.load().memory_saver_hook_mode != "torch":
        return
    try:
        load_memory_saver("torch")
    except Exception as error:
        note_absent("memory_saver", error)


def preload_where_wanted(
    original: Callable[..., AbstractContextManager[None]], adapter: Any
) -> AbstractContextManager[None]:
    """Around the adapter's method of this place: schedulers of mode torch start without preload."""
    if Settings.load().memory_saver_hook_mode == "torch":
        return nullcontext()
    return original(adapter)
