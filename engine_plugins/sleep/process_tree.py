"""A process and all that it has started, also where the kernel has lost the connection."""

from __future__ import annotations

from typing import Literal, NamedTuple

import psutil

from engine_plugins.sleep.memory_report import Reason
from engine_plugins.sleep.process_identity import (
    Presence,
    ProcessIdentity,
    local_pid,
    presence,
    start_ticks,
)

__all__ = ["ProcessTree", "Sight"]

_ABSENT: dict[Presence, Reason] = {"reused": "pid_reused", "out_of_sight": "other_namespace"}

Sight = Literal["here", "gone", "foreign"]
"""`gone`: it was of the tree; a driver lists a process until its memory is back."""


class ProcessTree:
    """Tells whether a process is of the tree.

    A child whose parent ends is given to another process. So a process that was once seen below
    the root stays of the tree.

    Args:
        root: a process of this pid namespace or of one below.
    """

    def __init__(self, root: ProcessIdentity) -> None:
        self.root = root
        self._root_pid: int | None = None
        self._known: dict[int, _Known] = {}
        """Processes besides the root, by pid as seen here: who hangs where is looked up once."""

    def root_pid(self) -> int | None:
        """The root's pid as seen here, `None` if it is not."""
        if self._root_pid is None or start_ticks(self._root_pid) != self.root.start_ticks:
            self._root_pid = local_pid(self.root)
        return self._root_pid

    def absence(self) -> tuple[Reason, str]:
        """Why the root is not seen here."""
        state = presence(self.root)
        return _ABSENT.get(state, "process_gone"), f"the worker, pid {self.root.pid}, is {state}"

    def sight(self, pid: int) -> Sight:
        """Whether the process of this pid, as seen here, is of the tree."""
        root = self.root_pid()
        if pid == root:
            return "here"
        known, ticks = self._known.get(pid), start_ticks(pid)
        if ticks is None:
            return "gone" if known is not None and known.sight == "here" else "foreign"
        if known is None or known.start_ticks != ticks:
            known = self._known[pid] = _Known(ticks, _hangs_below(root, pid))
        return known.sight


class _Known(NamedTuple):
    start_ticks: int
    sight: Sight


def _hangs_below(root: int | None, pid: int) -> Sight:
    try:
        parents = [parent.pid for parent in psutil.Process(pid).parents()]
    except (psutil.Error, ValueError):
        return "foreign"
    return "here" if root in parents else "foreign"
