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

from engine_plugins.errors import HookModeError
from engine_plugins.settings import PREFIX, Settings
from engine_plugins.sleep.hook_mode import choose_hook_mode
from engine_plugins.sleep.memory_saver import load_memory_saver
from engine_plugins.sleep.time_sharing import force_memory_saver

__all__ = ["preload_where_wanted", "prepare_memory_saver", "take_hook_mode"]

logger = logging.getLogger(__name__)

_MODE = PREFIX + "MEMORY_SAVER_HOOK_MODE"


def prepare_memory_saver(arguments: Any) -> None:
    """In the first process: settle whether the saver is on, and its mode, for all processes.

    Raises:
        HookModeError: the mode would end the schedulers, or their start.
    """
    on_cpu = arguments.device == "cpu" or (arguments.device is None and is_cpu())
    force_memory_saver(arguments, "enable_memory_saver", Settings.load(), on_cpu=on_cpu)
    if on_cpu or not arguments.enable_memory_saver:
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
    if Settings.load().memory_saver_hook_mode == "torch":
        load_memory_saver("torch")


def preload_where_wanted(
    original: Callable[..., AbstractContextManager[None]], adapter: Any
) -> AbstractContextManager[None]:
    """Around the adapter's method of this place: schedulers of mode torch start without preload."""
    if Settings.load().memory_saver_hook_mode == "torch":
        return nullcontext()
    return original(adapter)
