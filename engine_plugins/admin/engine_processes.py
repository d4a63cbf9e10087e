"""The processes that an engine is made of, and what the kernel says of each.

Each of them signs in when it starts, so who stands still can be named without asking anybody.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from engine_plugins.sleep.process_identity import start_ticks

__all__ = [
    "EngineProcess",
    "EngineProcesses",
    "has_ended",
    "kernel_state",
    "sign_in",
    "stands_still",
]

logger = logging.getLogger(__name__)

Role = Literal["engine core", "worker", "scheduler", "detokenizer", "detokenizer router"]

_FOLDER = "processes"
_SAID = {
    psutil.STATUS_STOPPED: "is stopped",
    psutil.STATUS_TRACING_STOP: "is stopped by a debugger",
    psutil.STATUS_DISK_SLEEP: "waits for a device and cannot be interrupted",
    psutil.STATUS_ZOMBIE: "has ended",
    psutil.STATUS_DEAD: "has ended",
}
"""What is said of a process that does not simply run or wait."""
_STILL = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


class EngineProcess(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the engine."""

    role: Role
    rank: int | None
    """Its rank in the tensor-parallel group, where the role has ranks."""
    pid: int
    start_ticks: int | None
    """When it started, by the kernel: its pid may be another's one day."""

    @property
    def name(self) -> str:
        """As errors name it, without its pid."""
        return self.role if self.rank is None else f"{self.role} rank {self.rank}"

    @property
    def has_ended(self) -> bool:
        """Whether it is there no more."""
        return has_ended(self.pid, self.start_ticks)


def sign_in(
    runtime_dir: Path, role: Role, rank: int | None = None, *, pid: int | None = None
) -> None:
    """Leave a note of this process, or of one that it has started, for those that will call it.

    An engine starts without it too; its processes are then not named, and their end is found out
    by their silence.
    """
    pid = os.getpid() if pid is None else pid
    me = EngineProcess(role=role, rank=rank, pid=pid, start_ticks=start_ticks(pid))
    target = runtime_dir / _FOLDER / me.name.replace(" ", "-")
    temporary = target.with_suffix(".tmp")
    try:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        temporary.write_bytes(msgspec.msgpack.encode(me))
        temporary.replace(target)
    except OSError as error:
        logger.warning("%s could not sign in: %s", me.name, error)


def kernel_state(pid: int) -> str:
    """What the kernel says that a process does; one that is not there has ended."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD
    except (psutil.Error, OSError):
        return psutil.STATUS_RUNNING  # nothing can be said of it


def has_ended(pid: int, started: int | None) -> bool:
    """Whether a process is there no more.

    A zombie is as dead as one that was waited for; what cannot be read counts as alive.
    """
    try:
        if started is not None and start_ticks(pid) != started:
            return True
    except OSError:
        return False
    return kernel_state(pid) in _ENDED


def stands_still(state: str) -> bool:
    """Whether a process in this state is stopped."""
    return state in _STILL


class EngineProcesses:
    """Those that have signed in to a runtime directory.

    What was read once is kept: the folder may be gone when it is needed most.
    """

    def __init__(self, runtime_dir: Path) -> None:
        self.runtime_dir = runtime_dir
        self._folder = runtime_dir / _FOLDER
        self._read_at: int | None = None
        self._known: list[EngineProcess] = []

    def all(self) -> list[EngineProcess]:
        """All of them, those that have ended too."""
        with suppress(OSError, msgspec.DecodeError):
            changed = self._folder.stat().st_mtime_ns
            if changed != self._read_at:
                notes = sorted(each for each in self._folder.iterdir() if each.suffix != ".tmp")
                self._known = [
                    msgspec.msgpack.decode(note.read_bytes(), type=EngineProcess) for note in notes
                ]
                self._read_at = changed
        return self._known

    def ended(self) -> str:
        """Who has ended, as part of a sentence; empty while all are there."""
        return _told({each.pid: "has ended" for each in self.all() if each.has_ended}, self.all())

    def still(self) -> str:
        """Who is stopped, as part of a sentence; empty if nobody is."""
        return self._told_of(_STILL)

    def unusual(self) -> str:
        """Who does not simply run or wait, as part of a sentence; empty if all do."""
        return self._told_of(tuple(_SAID))

    def named(self) -> str:
        """All of them by name and pid."""
        return ", ".join(f"{name} (pid {pid})" for pid, name in _names(self.all()).items())

    def _told_of(self, states: tuple[str, ...]) -> str:
        found = {each.pid: kernel_state(each.pid) for each in self.all()}
        said = {pid: _SAID[state] for pid, state in found.items() if state in states}
        return _told(said, self.all())


def _told(said: Mapping[int, str], processes: Iterable[EngineProcess]) -> str:
    names = _names(processes)
    return ", ".join(f"{names[pid]} (pid {pid}) {what}" for pid, what in said.items())


def _names(processes: Iterable[EngineProcess]) -> dict[int, str]:
    """Names by pid: with one rank, an engine's core may be its worker."""
    names: dict[int, str] = {}
    for each in processes:
        names[each.pid] = f"{names[each.pid]} and {each.name}" if each.pid in names else each.name
    return names
