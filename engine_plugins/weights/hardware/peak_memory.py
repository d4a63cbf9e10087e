"""Peak resident memory of this process over a stretch of time, read from the kernel."""

from __future__ import annotations

import ctypes
import functools
import os
import re
from dataclasses import dataclass

__all__ = ["PeakMemory", "resident_and_addresses", "return_free_memory"]

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """A measurement under way. `before_bytes` is -1 where the kernel does not say."""

    before_bytes: int
    already_held_bytes: int

    @classmethod
    def start(cls, *, already_held: int) -> PeakMemory:
        """Reset the kernel's high-water mark and begin.

        `already_held` bytes are resident from an earlier update and count as extra all the same.
        """
        try:
            os.pwrite(_kept_open(os.getpid(), "clear_refs", os.O_WRONLY), b"5", 0)
            before = _status_bytes(b"VmRSS")
        except OSError:
            before = -1
        return cls(before_bytes=before, already_held_bytes=already_held)

    def peak_extra_bytes(self) -> int:
        """Highest resident size since the start, over the size at the start; -1 if unknown."""
        if self.before_bytes < 0:
            return -1
        return max(_status_bytes(b"VmHWM") - self.before_bytes, 0) + self.already_held_bytes


def resident_and_addresses() -> tuple[int, int]:
    """Bytes of this process that are resident, and of its addresses."""
    file = _kept_open(os.getpid(), "statm", os.O_RDONLY)
    addresses, resident, _ = os.pread(file, 256, 0).split(b" ", 2)
    return int(resident) * _PAGE, int(addresses) * _PAGE


def return_free_memory() -> None:
    """Have the C library give memory that nobody uses back to the kernel, where it can.

    It keeps what was freed between blocks in use. A load that frees and makes one large tensor
    after the other would otherwise grow by as much as the whole model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(field: bytes) -> int:
    status = os.pread(_kept_open(os.getpid(), "status", os.O_RDONLY), 8192, 0)
    found = re.search(rb"^%s:\s+(\d+) kB" % field, status, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field.decode()}")
    return int(found.group(1)) * 1024


@functools.cache
def _kept_open(pid: int, name: str, flags: int) -> int:
    """To open such a file takes longer than to read it. A fork opens its own."""
    return os.open(f"/proc/{pid}/{name}", flags | os.O_CLOEXEC)
