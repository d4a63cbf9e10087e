"""What a server owns, and what of it is left when it has ended."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from tests.chaos_update.fleet import Target

__all__ = ["Owned", "group_of", "shared_by"]

PATIENCE_S = 3.0
_SHARED = "/dev/shm/"
_ENGINES_OWN = ("/dev/shm/sglang_loads_", "/dev/shm/vllm_dist_")
"""SGLang ends its processes by SIGKILL and never unlinks the former, as its own
srt/utils/stale_shm_cleanup.py says. vLLM unlinks the latter, its all-reduce on the CPU, in the
destructor of a process that ends by itself (csrc/cpu/shm.cpp); a killed rank runs none."""


class Owned:
    """The processes, shared memory and runtime directory of a running server."""

    def __init__(self, target: Target) -> None:
        self._runtime_dir = target.runtime_dir
        self.members = list(group_of(target.server.pid))
        self._names = {each.pid: _name(each) for each in self.members}
        self._shared = {path for each in self.members for path in shared_by(each.pid)}

    def running(self) -> bool:
        """Whether any of its processes still runs."""
        return any(map(_runs, self.members))

    def named(self) -> list[str]:
        """Its processes that still run."""
        return [self._names[each.pid] for each in self.members if _runs(each)]

    def unfinished(self) -> list[str]:
        """Files that were begun and neither completed nor removed."""
        return [path.name for path in self._runtime_dir.rglob("*.tmp")]

    def left(self, *, directory: bool = True) -> list[str]:
        """What is still there of a server that has ended."""
        give_up = time.monotonic() + PATIENCE_S
        while self.running() and time.monotonic() < give_up:
            time.sleep(0.1)
        found = self.named()
        found += [
            path
            for path in sorted(self._shared)
            if os.path.exists(path) and not path.startswith(_ENGINES_OWN)
        ]
        if directory and self._runtime_dir.exists():
            found.append("its runtime directory")
        return found


def group_of(leader: int) -> Iterator[psutil.Process]:
    """The living processes of a process group, and their children."""
    for each in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(each.pid) == leader:
                yield each


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        tracker = "resource_tracker" in " ".join(process.cmdline())
        return f"process {process.pid} ({'resource tracker' if tracker else process.name()})"
    return f"process {process.pid}"


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def shared_by(pid: int) -> set[str]:
    """Paths of shared memory that a process has mapped or open."""
    found: set[str] = set()
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if _SHARED in line and not line.endswith("(deleted)"):
                found.add(_SHARED + line.partition(_SHARED)[2])
    with suppress(OSError):
        for each in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                path = os.readlink(each)
                if path.startswith(_SHARED) and not path.endswith("(deleted)"):
                    found.add(path)
    return found
