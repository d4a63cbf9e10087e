"""The general plugin: loaded by vLLM in every process, before anything is built.

It only looks on where vLLM's arguments are made whole. What they ask for is installed then; the
core of such a server finds it in its environment, and its workers in their extension.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from importlib import import_module
from typing import Any

from vllm_ext.asked import RUNTIME_DIR, asks_for_us, forget_other_server

__all__ = ["register", "watch_arguments"]

_CORE, _WORKER = "EngineCore", "VllmWorker"
"""How the names of vLLM's processes begin; a core has its hooks as it loads its plugins."""
_WATCHED = "engine_plugins_hooked"


def register() -> None:
    """Entry point of group `vllm.general_plugins`; safe to call more than once."""
    process = multiprocessing.current_process().name
    if process.startswith(_CORE):
        if RUNTIME_DIR in os.environ:
            import_module("vllm_ext.hooks").hook_core()
    elif not process.startswith(_WORKER) and "vllm.engine.arg_utils" in sys.modules:
        watch_arguments()


def watch_arguments() -> None:
    """Wrap the one function that every vLLM makes its configuration with."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if hasattr(original, _WATCHED):
        return

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        if asks_for_us(self):
            configured = import_module("vllm_ext.engine_arguments").configured
            return configured(functools.partial(original, self, *args, **kwargs), self)
        forget_other_server()
        return original(self, *args, **kwargs)

    setattr(create_engine_config, _WATCHED, True)
    EngineArgs.create_engine_config = create_engine_config
