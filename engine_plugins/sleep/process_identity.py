"""Who a process is, beyond its pid: pids are used again, and differ between pid namespaces."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

__all__ = [
    "HOST_NAMESPACE",
    "Presence",
    "ProcessIdentity",
    "identify",
    "local_pid",
    "own_namespace",
    "presence",
    "start_ticks",
]

HOST_NAMESPACE = 0xEFFFFFFC
"""The inode of the first pid namespace of every Linux kernel: the host's."""

_PROC = Path("/proc")

Presence = Literal["here", "gone", "reused", "out_of_sight"]
"""`reused`: another process has the pid. `out_of_sight`: it lives in a namespace not seen here."""


class ProcessIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """A process for as long as the machine runs, wherever it is looked at from."""

    boot_id: str
    pid: int
    """In the process's own pid namespace."""
    start_ticks: int
    """Clock ticks from boot to its start."""
    pid_namespace: int
    """Inode of its pid namespace."""
    namespace_pids: list[int]
    """Its pid in each namespace from the observer's to its own."""


def identify(pid: int | None = None) -> ProcessIdentity:
    """The identity of a process that is seen here, by its pid here; by default this one.

    Raises:
        ProcessLookupError: there is no such process.
        PermissionError: its namespace may not be read.
    """
    folder = _PROC / str(os.getpid() if pid is None else pid)
    try:
        ticks = _start_ticks(folder.name)
        namespace = (folder / "ns" / "pid").stat().st_ino
        chain = _namespace_pids(folder)
        same = _start_ticks(folder.name) == ticks
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"there is no process {folder.name}") from None
    if not same:
        raise ProcessLookupError(f"process {folder.name} was replaced while it was read")
    return ProcessIdentity(
        boot_id=_boot_id(),
        pid=chain[-1],
        start_ticks=ticks,
        pid_namespace=namespace,
        namespace_pids=chain,
    )


def own_namespace() -> int:
    """Inode of the pid namespace of this process."""
    return (_PROC / "self" / "ns" / "pid").stat().st_ino


def presence(identity: ProcessIdentity) -> Presence:
    """Whether the process is still there, seen from here."""
    if identity.boot_id != _boot_id():
        return "gone"
    if identity.pid_namespace == own_namespace():
        ticks = start_ticks(identity.pid)
        if ticks is None:
            return "gone"
        return "here" if ticks == identity.start_ticks else "reused"
    return "here" if local_pid(identity) is not None else "out_of_sight"


def local_pid(identity: ProcessIdentity) -> int | None:
    """The process's pid in this process's namespace; `None` if it is not seen from here.

    A process of a namespace below is found by its `NSpid`.
    """
    if identity.boot_id != _boot_id():
        return None
    if identity.pid_namespace == own_namespace():
        return identity.pid if presence(identity) == "here" else None
    return next((int(each.name) for each in _PROC.glob("[0-9]*") if _is(each, identity)), None)


def start_ticks(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process seen here; `None` if there is none."""
    try:
        return _start_ticks(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None


def _is(folder: Path, identity: ProcessIdentity) -> bool:
    try:
        return (
            _start_ticks(folder.name) == identity.start_ticks
            and _namespace_pids(folder)[-1] == identity.pid
            and (folder / "ns" / "pid").stat().st_ino == identity.pid_namespace
        )
    except OSError:
        return False


def _start_ticks(pid: int | str) -> int:
    # Without pathlib, which costs more than the read: a probe asks this of every process on a GPU.
    with open(f"/proc/{pid}/stat", "rb") as file:
        stat = file.read()
    # The name in parentheses may hold spaces and parentheses; field 22 is counted behind it.
    return int(stat.rpartition(b")")[2].split()[19])


def _namespace_pids(folder: Path) -> list[int]:
    for line in (folder / "status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return [int(pid) for pid in line.split()[1:]]
    return [int(folder.name)]


@cache
def _boot_id() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
