"""Pages of host memory: which of a range can be given back to the kernel, and giving them back.

Only whole pages of private anonymous memory can: the kernel drops them at once, and they read as
zero afterwards. Dropping a page of a mapped file would bring the file's bytes back, and a page of
shared memory stays where it is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Extent", "drop_pages", "private_pages", "view"]

_MAPS = Path("/proc/self/maps")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Extent(NamedTuple):
    """Bytes of this process's memory, from an address on."""

    address: int
    nbytes: int

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.address + self.nbytes


def private_pages(extents: Iterable[Extent]) -> list[Extent]:
    """The whole pages of the extents that are private anonymous memory, in order of address."""
    inner = [each for extent in sorted(extents) if (each := _whole_pages(extent)).nbytes > 0]
    found = []
    anonymous = _anonymous()
    area = next(anonymous, None)
    for extent in inner:
        while area is not None and area.end <= extent.address:
            area = next(anonymous, None)
        while area is not None and area.address < extent.end:
            start, end = max(area.address, extent.address), min(area.end, extent.end)
            found.append(Extent(start, end - start))
            if area.end >= extent.end:
                break
            area = next(anonymous, None)
    return found


def drop_pages(pages: Sequence[Extent]) -> None:
    """Give pages back to the kernel; they stay mapped, and read as zero.

    Raises:
        OSError: the kernel refuses (locked memory); the text says which pages.
    """
    for extent in pages:
        if _libc.madvise(extent.address, extent.nbytes, mmap.MADV_DONTNEED):
            number = ctypes.get_errno()
            raise OSError(
                number,
                f"madvise({extent.address:#x}, {extent.nbytes} bytes): {os.strerror(number)}",
            )


def view(extent: Extent) -> memoryview:
    """The bytes of an extent, to read or to write."""
    return memoryview((ctypes.c_char * extent.nbytes).from_address(extent.address)).cast("B")


def _whole_pages(extent: Extent) -> Extent:
    start = -(-extent.address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = extent.end // mmap.PAGESIZE * mmap.PAGESIZE
    return Extent(start, end - start)


def _anonymous() -> Iterator[Extent]:
    """Private anonymous areas of this process that can be written, in order of address."""
    with _MAPS.open() as areas:
        for line in areas:
            span, rights, _, _, inode, *name = line.split(maxsplit=5)
            special = bool(name) and not name[0].startswith(("[heap]", "[anon"))
            if rights.startswith("rw") and rights.endswith("p") and inode == "0" and not special:
                first, last = (int(part, 16) for part in span.split("-"))
                yield Extent(first, last - first)
