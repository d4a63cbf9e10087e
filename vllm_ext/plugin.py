"""The general plugin: loaded by vLLM in every process, before anything is built.

The first process lays out the runtime directory and leaves its path in the environment, so that
API servers, the engine's core and the workers all find the same one. Then each process gets the
hooks that belong to it.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

from engine_plugins.admin.shared_state import create_runtime_dir
from engine_plugins.settings import PREFIX

__all__ = ["RUNTIME_DIR", "register"]

RUNTIME_DIR = PREFIX + "RUNTIME_DIR"
_OWNER = PREFIX + "RUNTIME_OWNER"


def register() -> None:
    """Entry point of group `vllm.general_plugins`; safe to call more than once."""
    _speak_through_vllm()
    if _is_first_process():
        _become_first_process()
    if "vllm.v1.engine.core" in sys.modules:
        from vllm_ext.core_hooks import hook_engine_core

        hook_engine_core()
    if "vllm.entrypoints.launchers.app" in sys.modules:
        from vllm_ext.admin_mount import hook_app
        from vllm_ext.admission_hook import hook_admission

        hook_app()
        hook_admission()


def _is_first_process() -> bool:
    """Whether this process starts a server of its own.

    vLLM starts all others through multiprocessing. A directory that was merely inherited, from a
    program that had loaded the plugin itself and then ran `vllm serve`, is another server's.
    """
    if multiprocessing.parent_process() is not None:
        return RUNTIME_DIR not in os.environ
    return os.environ.get(_OWNER) != str(os.getpid())


def _become_first_process() -> None:
    path = Path(tempfile.mkdtemp(prefix="engine-plugins-"))
    create_runtime_dir(path)
    os.environ[RUNTIME_DIR] = str(path)
    owner = os.getpid()
    os.environ[_OWNER] = str(owner)

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)


def _speak_through_vllm() -> None:
    """Have our loggers answer to vLLM's handlers: its processes show no others."""
    vllm_logger = logging.getLogger("vllm")
    for name in ("engine_plugins", "vllm_ext"):
        ours = logging.getLogger(name)
        if not ours.handlers:
            ours.handlers = vllm_logger.handlers
            ours.setLevel(vllm_logger.level)
            ours.propagate = False
