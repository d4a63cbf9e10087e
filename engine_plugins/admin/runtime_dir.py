"""Where the processes of one server meet: a directory whose path they inherit.

The first process lays it out and leaves the path in its environment, so that API processes, the
engine's core and its workers all find the same one. It is gone when that process ends.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from engine_plugins.admin.shared_state import SharedState, create_runtime_dir
from engine_plugins.settings import PREFIX
from engine_plugins.sleep.process_identity import ProcessIdentity, identify

__all__ = ["RUNTIME_DIR", "ensure_runtime_dir", "first_process", "shared_state"]

RUNTIME_DIR = PREFIX + "RUNTIME_DIR"
_OWNER = PREFIX + "RUNTIME_OWNER"


def ensure_runtime_dir() -> None:
    """Lay the directory out, if this is the first process of a server; repeating is harmless."""
    if _is_first_process():
        _lay_out()


def first_process() -> ProcessIdentity | None:
    """The process that laid the directory out, if it is this one or one above it.

    Any other pid may be of another pid namespace, or used again.
    """
    with suppress(OSError, psutil.Error):
        for each in (psutil.Process(), *psutil.Process().parents()):
            if str(each.pid) == os.environ.get(_OWNER):
                return identify(each.pid)
    return None


def shared_state() -> SharedState:
    """This process's view of its server's state."""
    return SharedState(Path(os.environ[RUNTIME_DIR]))


def _is_first_process() -> bool:
    """Whether this process starts a server of its own.

    Engines start all others through multiprocessing. A directory that was merely inherited, from
    a program that had loaded the plugin itself and then ran a server, is another server's.
    """
    if multiprocessing.parent_process() is not None:
        return RUNTIME_DIR not in os.environ
    return os.environ.get(_OWNER) != str(os.getpid())


def _lay_out() -> None:
    path = Path(tempfile.mkdtemp(prefix="engine-plugins-"))
    create_runtime_dir(path)
    os.environ[RUNTIME_DIR] = str(path)
    owner = os.getpid()
    os.environ[_OWNER] = str(owner)

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
