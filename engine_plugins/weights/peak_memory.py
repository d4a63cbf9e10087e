"""Peak resident memory of this process over a stretch of time, read from the kernel."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PeakMemory", "return_free_memory"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


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
            _CLEAR_REFS.write_text("5")
            before = _status_bytes("VmRSS")
        except OSError:
            before = -1
        return cls(before_bytes=before, already_held_bytes=already_held)

    def peak_extra_bytes(self) -> int:
        """Highest resident size since the start, over the size at the start; -1 if unknown."""
        if self.before_bytes < 0:
            return -1
        return max(_status_bytes("VmHWM") - self.before_bytes, 0) + self.already_held_bytes


def return_free_memory() -> None:
    """Have the C library give memory that nobody uses back to the kernel, where it can.

    It keeps what was freed between blocks in use. A load that frees and makes one large tensor
    after the other would otherwise grow by as much as the whole model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(found.group(1)) * 1024
