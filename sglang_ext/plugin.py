"""The plugin of group `sglang.srt.plugins`: loaded by SGLang in every process of a server.

A server that did not ask for us is left alone: it has no flag of ours, and no
`ENGINE_PLUGINS_ENABLE`. Otherwise each process gets the hooks that belong to it; which it is, the
process that starts the engine says in the environment.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from importlib import import_module
from typing import Any

__all__ = ["register"]

_PREFIX = "ENGINE_PLUGINS_"
_ROLE = _PREFIX + "RUNTIME_ROLE"
_ENABLE = _PREFIX + "ENABLE"
_FLAG = "--engine-plugins"
_SWITCHED_OFF = ("", "0", "false", "off")
_LAUNCHER = "sglang.srt.entrypoints.engine"


def register() -> None:
    """Entry point; SGLang calls it once in each process."""
    role = os.environ.pop(_ROLE, None)  # what this process starts is no scheduler
    if role is not None:
        _process_hooks().hook_scheduler()
    elif "sglang_ext.http_app" in sys.modules:
        _process_hooks().hook_api_process()
    elif _is_asked():
        _process_hooks().hook_first_process()


def _is_asked() -> bool:
    """Whether this process may start an engine, and somebody asked for us.

    A program does so by a flag. What multiprocessing started has the command line of another; there
    the environment speaks, if it is a process that can start an engine at all.
    """
    enabled = os.environ.get(_ENABLE, "").lower() not in _SWITCHED_OFF
    if multiprocessing.parent_process() is None:
        return enabled or any(argument.startswith(_FLAG) for argument in sys.argv)
    return enabled and _LAUNCHER in sys.modules


def _process_hooks() -> Any:
    return import_module("sglang_ext.process_hooks")
