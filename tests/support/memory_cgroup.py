"""A real cgroup with a memory limit, where this machine lets one be made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["MemoryCgroup", "memory_cgroup"]

_ROOT = Path("/sys/fs/cgroup")


class MemoryCgroup:
    """One that processes can be moved to; its limit can change.

    Args:
        folder: of the cgroup.
        limit_file: that its hierarchy keeps the limit in.
    """

    def __init__(self, folder: Path, limit_file: str) -> None:
        self.folder, self._limit_file = folder, limit_file

    def limit(self, nbytes: int) -> None:
        """Set the limit; what is above is killed by the kernel."""
        (self.folder / self._limit_file).write_text(str(nbytes))

    def add(self, pid: int) -> None:
        """Move a process here; what it starts from now on is here too."""
        (self.folder / "cgroup.procs").write_text(str(pid))


@contextlib.contextmanager
def memory_cgroup(name: str) -> Iterator[MemoryCgroup | None]:
    """A cgroup below this process's own; `None` where none can be made."""
    place = _place()
    if place is None:
        yield None
        return
    parent, limit_file = place
    folder = parent / name
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        group = MemoryCgroup(folder, limit_file)
        try:
            group.limit(1 << 40)
        except OSError:
            yield None
        else:
            yield group
    finally:
        _remove(folder)


def _place() -> tuple[Path, str] | None:
    """The folder of this process's cgroup that counts memory, and its file for the limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
        if not controllers and (_ROOT / "cgroup.controllers").exists():
            return _ROOT / path.lstrip("/"), "memory.max"
    return None


def _remove(folder: Path) -> None:
    """The kernel needs a moment to see that processes have left."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.05)
