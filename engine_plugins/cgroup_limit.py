"""The memory limit of this process's cgroup, in the old hierarchy or the unified one.

Layout: Linux `Documentation/admin-guide/cgroup-v1/memory.rst` and `cgroup-v2.rst`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["CGROUPS", "tightest_cgroup"]

CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60
"""The old hierarchy has no word for it, and says the largest number of pages."""


class _Files(NamedTuple):
    """Where a hierarchy keeps its figures; page cache is not counted as used."""

    limit: str
    used: str
    cache: tuple[str, str]


_OLD = _Files(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_UNIFIED = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


def tightest_cgroup(root: Path = CGROUPS, own: Path = _OWN) -> tuple[int | None, int]:
    """Limit and use, in bytes, of the cgroup with the least room: this process's or one above it.

    `None` and 0 where nothing is limited.

    Args:
        root: where cgroups are mounted.
        own: which cgroups this process is in.
    """
    found = (
        limit
        for top, folder, files in _hierarchies(root, own)
        for each in (folder, *folder.parents)
        if each.is_relative_to(top) and (limit := _limit(each, files)) is not None
    )
    return min(found, key=lambda each: each[0] - each[1], default=(None, 0))


def _hierarchies(root: Path, own: Path) -> Iterator[tuple[Path, Path, _Files]]:
    """Of each hierarchy that counts memory: its top, this process's folder, its files."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "unified" if (root / "unified").is_dir() else root
            yield top, top / path.lstrip("/"), _UNIFIED
        elif "memory" in controllers.split(","):
            yield root / "memory", root / "memory" / path.lstrip("/"), _OLD


def _limit(folder: Path, files: _Files) -> tuple[int, int] | None:
    try:
        limit = (folder / files.limit).read_text().strip()
        if limit == "max" or int(limit) >= _UNLIMITED:
            return None
        used = int((folder / files.used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(limit), used - sum(int(stat[name]) for name in files.cache)
    except (OSError, ValueError, KeyError):
        return None
