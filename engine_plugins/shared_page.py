"""A page of memory that processes of one host share: the newest bytes of whoever writes it.

Reading takes no lock and never blocks. Writers, where there are several, keep each other out.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Self

from engine_plugins.errors import EnginePluginError

__all__ = ["SharedPage"]

_SLOT_HEADER = struct.Struct("<QII")
"""Sequence, payload length, checksum of both the sequence and the payload.

A header is not stored at once: without the sequence in it, an old one could go with newer bytes.
"""
_FIRST_SLOT = 64


class SharedPage:
    """One process's view of the page in a file.

    Two slots by turns: a writer that dies half way has spoiled only the one that nobody reads.
    """

    def __init__(self, path: Path, memory: memoryview | None = None) -> None:
        self._path = path
        self._page = _mapped(path) if memory is None else memory
        self._slot_bytes = (len(self._page) - _FIRST_SLOT) // 2
        self._sequence = self._page[:8].cast("Q")
        """How often the bytes were replaced, which also says the slot that holds them.

        A memory view stores its item at once; `struct` zeroes the bytes before it fills them.
        """
        self.gauges = self._page[8:_FIRST_SLOT].cast("q")
        """Seven numbers beside the bytes, each replaced by itself."""

    @classmethod
    def parts(cls, path: Path, sizes: Sequence[int]) -> list[Self]:
        """Several pages that lie in one file, mapped once; sizes are multiples of 8."""
        memory = _mapped(path)
        ends = accumulate(sizes)
        return [cls(path, memory[end - size : end]) for size, end in zip(sizes, ends, strict=True)]

    @staticmethod
    def create(path: Path, *, nbytes: int) -> None:
        """Lay out an empty page of `nbytes`, unless the file is there.

        Whoever sees the file sees all of it: it gets its name when its bytes are there.
        """
        if path.exists():
            return
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.") as file:
            # Really allocated: a page that finds no room when it is written to ends the process.
            os.posix_fallocate(file.fileno(), 0, nbytes)
            with contextlib.suppress(FileExistsError):  # another process was quicker
                os.link(file.name, path)

    @property
    def sequence(self) -> int:
        """How often the page was written: 0 for one that never was."""
        return self._sequence[0]

    def read(self) -> tuple[int, bytes]:
        """The sequence and the bytes of the newest write; 0 and nothing before the first.

        Raises:
            EnginePluginError: the page is spoiled.
        """
        for _ in range(1000):
            sequence = self._sequence[0]
            slot = self._slot(sequence)
            written, length, checksum = _SLOT_HEADER.unpack_from(self._page, slot)
            first = slot + _SLOT_HEADER.size
            payload = bytes(self._page[first : first + length])
            if sequence == 0:
                return 0, b""
            if written == sequence and _checksum(sequence, payload) == checksum:
                return sequence, payload
            time.sleep(0.0001)  # two writers passed while we read; look again
        raise EnginePluginError(f"the page {self._path} cannot be read")

    def write(self, payload: bytes, before_it_shows: Callable[[], None] | None = None) -> None:
        """Replace the bytes; no other process may be writing.

        Args:
            payload: the new bytes.
            before_it_shows: called when they lie there and nobody reads them yet; what it raises
                leaves the old ones.

        Raises:
            EnginePluginError: they do not fit.
        """
        if len(payload) > self._slot_bytes - _SLOT_HEADER.size:
            raise EnginePluginError(f"{len(payload)} bytes do not fit the page {self._path}")
        sequence = self._sequence[0] + 1
        slot = self._slot(sequence)
        checksum = _checksum(sequence, payload)
        _SLOT_HEADER.pack_into(self._page, slot, sequence, len(payload), checksum)
        first = slot + _SLOT_HEADER.size
        self._page[first : first + len(payload)] = payload
        if before_it_shows is not None:
            before_it_shows()
        self._sequence[0] = sequence

    def _slot(self, sequence: int) -> int:
        return _FIRST_SLOT + self._slot_bytes * (sequence % 2)


def _mapped(path: Path) -> memoryview:
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 0))


def _checksum(sequence: int, payload: bytes) -> int:
    return zlib.crc32(payload, sequence & 0xFFFFFFFF)
