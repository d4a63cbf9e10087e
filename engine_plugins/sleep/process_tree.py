"""A process and all that it has started, also where the kernel has lost the connection."""

from __future__ import annotations

from typing import Literal

import psutil

from engine_plugins.sleep.process_identity import ProcessIdentity, identify, local_pid, presence

__all__ = ["ProcessTree", "Sight"]

Sight = Literal["here", "gone", "foreign"]
"""`gone`: it was of the tree; a driver lists a process until its memory is back."""


class ProcessTree:
    """Tells whether a process is of the tree.

    A child whose parent ends is given to another process. So a process that was once seen below
    the root stays of the tree, and one that registers is of it wherever it hangs.

    Args:
        root: a process of this pid namespace or of one below.
    """

    def __init__(self, root: ProcessIdentity) -> None:
        self.root = root
        self._root_pid: int | None = None
        self._known: dict[int, ProcessIdentity] = {}
        """Processes besides the root, by pid as seen here."""

    def root_pid(self) -> int | None:
        """The root's pid as seen here, `None` if it is not."""
        if self._root_pid is None or not _has_pid(self.root, self._root_pid):
            self._root_pid = local_pid(self.root)
        return self._root_pid

    def register(self, process: ProcessIdentity) -> None:
        """Count a process in, wherever it hangs in the tree.

        Raises:
            ProcessLookupError: it is not seen here.
        """
        pid = local_pid(process)
        if pid is None:
            raise ProcessLookupError(f"process {process.pid} is not seen here")
        self._known[pid] = process

    def sight(self, pid: int) -> Sight:
        """Whether the process of this pid, as seen here, is of the tree."""
        root = self.root_pid()
        if pid == root:
            return "here"
        if pid in self._known:
            state = presence(self._known[pid])
            if state != "reused":
                return "here" if state == "here" else "gone"
            del self._known[pid]
        try:
            if root not in [parent.pid for parent in psutil.Process(pid).parents()]:
                return "foreign"
            self._known[pid] = identify(pid)
        except (psutil.Error, ProcessLookupError, PermissionError, ValueError):
            return "foreign"
        return "here"


def _has_pid(process: ProcessIdentity, pid: int) -> bool:
    try:
        found = identify(pid)
    except (ProcessLookupError, PermissionError):
        return False
    return (found.start_ticks, found.pid_namespace, found.pid) == (
        process.start_ticks,
        process.pid_namespace,
        process.pid,
    )
