"""Host memory of a process, from the kernel: the figure of the CPU platform."""

from __future__ import annotations

from pathlib import Path

import psutil

from engine_plugins.sleep.memory_report import Rung

__all__ = ["process_memory"]

_KEPT_PAGES = ("RssAnon", "RssShmem")


def process_memory(pid: int) -> Rung:
    """Resident anonymous and shared memory of a process, by its pid here.

    Pages of files are left out: they are the page cache's, and go when memory is wanted. A kernel
    that does not tell them apart gives an upper bound.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        found = dict(line.split(":", 1) for line in status.splitlines() if line.startswith("Rss"))
        if all(name in found for name in _KEPT_PAGES):
            kib = sum(int(found[name].split()[0]) for name in _KEPT_PAGES)
            return Rung(source="process", resident_bytes=kib * 1024, quality="exact")
        rss = psutil.Process(pid).memory_info().rss
    except (OSError, psutil.NoSuchProcess) as error:
        return Rung(source="process", reason="process_gone", detail=f"{pid}: {error}")
    return Rung(
        source="process",
        resident_bytes=rss,
        quality="upper_bound",
        reason="counts_file_pages",
        detail="this kernel does not tell pages of files from others",
    )
