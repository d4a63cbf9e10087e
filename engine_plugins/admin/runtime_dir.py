"""Where the processes of one server meet: a directory whose path they inherit.

The process that builds the engine lays it out and leaves the path in its environment, so that API
processes, the engine's core and its workers all find the same one. Each of them holds a lock on
it for as long as it lives, and it is gone when the first one ends.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import NamedTuple

import psutil

from engine_plugins.admin.dead_servers import clear_dead_servers, note_owner
from engine_plugins.admin.shared_state import SharedState, create_runtime_dir
from engine_plugins.admin.staging_claims import StagingClaims
from engine_plugins.settings import PREFIX
from engine_plugins.sleep.process_identity import ProcessIdentity, identify

__all__ = [
    "RUNTIME_DIR",
    "ensure_runtime_dir",
    "first_process",
    "hold_runtime_dir",
    "is_started_by_owner",
    "join_runtime_dir",
    "remove_runtime_dir",
    "shared_state",
]

RUNTIME_DIR = PREFIX + "RUNTIME_DIR"
_OWNER = PREFIX + "RUNTIME_OWNER"
_PREFIX = "engine-plugins-"


class _Held(NamedTuple):
    """A directory that a process holds; a fork inherits the note, so the process is in it."""

    pid: int
    path: Path


_laid_out: _Held | None = None
_held: _Held | None = None


def ensure_runtime_dir() -> Path:
    """Lay out the directory of the server that this process builds; repeating is harmless.

    One that was merely inherited is another server's: of a program that built an engine itself
    and then started servers, by multiprocessing or as programs of their own.
    """
    global _laid_out
    if _laid_out is None or _laid_out.pid != os.getpid() or not _laid_out.path.exists():
        clear_dead_servers(Path(tempfile.gettempdir()), _PREFIX)
        StagingClaims().clear_dead()
        _laid_out = _Held(os.getpid(), _lay_out())
    os.environ[RUNTIME_DIR] = str(_laid_out.path)
    os.environ[_OWNER] = str(os.getpid())
    return _laid_out.path


def join_runtime_dir() -> Path:
    """Take the directory that this process has inherited, or lay one out where it has none."""
    if RUNTIME_DIR not in os.environ:
        return ensure_runtime_dir()
    hold_runtime_dir()
    return Path(os.environ[RUNTIME_DIR])


def hold_runtime_dir() -> None:
    """Keep the directory from being taken for a dead server's while this process lives.

    What clears folders for temporary files, systemd-tmpfiles as well, leaves a locked one alone.
    """
    global _held
    wanted = _Held(os.getpid(), Path(os.environ[RUNTIME_DIR]))
    if wanted == _held:
        return
    with suppress(OSError):  # without it the server works as well
        folder = os.open(wanted.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)  # it stays open to the end
        _held = wanted


def remove_runtime_dir() -> None:
    """Remove the directory, if this process has laid it out: the server ends."""
    if _laid_out is not None and _laid_out.pid == os.getpid():
        shutil.rmtree(_laid_out.path, ignore_errors=True)


def is_started_by_owner(parent_pid: int) -> bool:
    """Whether a process started by `parent_pid` belongs to the server whose directory it knows."""
    return RUNTIME_DIR in os.environ and os.environ.get(_OWNER) == str(parent_pid)


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


def _lay_out() -> Path:
    path = Path(tempfile.mkdtemp(prefix=_PREFIX))
    os.environ[RUNTIME_DIR] = str(path)
    hold_runtime_dir()
    create_runtime_dir(path)
    note_owner(path)
    atexit.register(remove_runtime_dir)
    Finalize(None, remove_runtime_dir, exitpriority=-1)  # a process that was forked runs no other
    return path
