"""Where the steps of a plan lie in a receive buffer that is smaller than all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Window", "schedule"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Where a step lies in the receive buffer, and how many steps must be installed first."""

    offset_bytes: int
    installed_before: int


def schedule(sizes: Sequence[int], capacity: int) -> list[Window]:
    """Place steps in a ring of `capacity` bytes, in order.

    A step may be fetched as soon as the steps whose bytes it overwrites are installed. With a
    capacity of all sizes together nothing waits: that is a staged update.
    """
    windows: list[Window] = []
    position = 0
    wrapped = False
    for size in sizes:
        if not size:
            windows.append(Window(offset_bytes=position, installed_before=0))
            continue
        if position + size > capacity:
            position, wrapped = 0, True
        before = _last_overlap(windows, sizes, position, size) if wrapped else -1
        windows.append(Window(offset_bytes=position, installed_before=before + 1))
        position += size
    return windows


def _last_overlap(windows: list[Window], sizes: Sequence[int], start: int, size: int) -> int:
    for index in range(len(windows) - 1, -1, -1):
        other = windows[index].offset_bytes
        if start < other + sizes[index] and other < start + size:
            return index
    return -1
