"""Locks that processes of one host share: single bytes of a file, each a lock of its own.

The file is opened once, so taking a lock later needs no descriptor, no path and no room on a disk.
The kernel frees the locks of a process that dies, and keeps those of one that is stopped.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import weakref
from pathlib import Path

__all__ = ["ByteLocks"]

_FLOCK = struct.Struct("@hhqqi4x")
"""`struct flock` of Linux on 64 bits: kind, whence, start, length, pid (0: it asks for none)."""

_every: weakref.WeakSet[ByteLocks] = weakref.WeakSet()


class ByteLocks:
    """One process's hold on the locks of a file; its threads and tasks exclude each other too.

    The locks belong to the open file (`F_OFD_SETLK`), not to the process: two of these in one
    process exclude each other as two processes do.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mine: set[int] = set()
        self._among_threads = threading.Lock()
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        _every.add(self)

    def take(self, place: int) -> bool:
        """Take a lock, unless somebody has it."""
        with self._among_threads:
            if place in self._mine:
                return False
            try:
                fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _wanted(fcntl.F_WRLCK, place))
            except (BlockingIOError, PermissionError):  # both say that another holds it
                return False
            self._mine.add(place)
            return True

    def give(self, place: int) -> None:
        """Give a lock back."""
        with self._among_threads:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _wanted(fcntl.F_UNLCK, place))
            self._mine.discard(place)

    def is_taken(self, place: int) -> bool:
        """Whether anybody has the lock now."""
        if place in self._mine:
            return True
        found = fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, _wanted(fcntl.F_WRLCK, place))
        return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)

    def _open_anew(self) -> None:
        """In a forked child: it shares the open file, and would hold its parent's locks."""
        inherited, self._file = self._file, -1
        self._mine, self._among_threads = set(), threading.Lock()
        try:
            # Through the descriptor: the path may be gone.
            self._file = os.open(f"/proc/self/fd/{inherited}", os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.close(inherited)

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)


def _wanted(kind: int, place: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0)


def _after_fork() -> None:
    for locks in list(_every):
        locks._open_anew()


os.register_at_fork(after_in_child=_after_fork)
