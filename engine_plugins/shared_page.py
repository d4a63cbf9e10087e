"""A page of memory that processes of one host share: the newest bytes of whoever writes it.

Reading takes no lock and never blocks. Writers, where there are several, keep each other out.
"""

from __future__ import annotations

import mmap
import struct
import time
import zlib
from pathlib import Path

from engine_plugins.errors import EnginePluginError

__all__ = ["SharedPage"]

_SLOT_HEADER = struct.Struct("<QII")
"""Sequence, payload length, CRC-32 of the payload."""
_FIRST_SLOT = 64


class SharedPage:
    """One process's view of the page in a file.

    Two slots by turns: a writer that dies half way has spoiled only the one that nobody reads.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 0)
        self._slot_bytes = (len(self._page) - _FIRST_SLOT) // 2
        self._sequence = memoryview(self._page)[:8].cast("Q")
        """How often the bytes were replaced, which also says the slot that holds them.

        A memory view stores its item at once; `struct` zeroes the bytes before it fills them.
        """

    @staticmethod
    def create(path: Path, *, nbytes: int) -> None:
        """Lay out an empty page of `nbytes`, unless the file is there."""
        if not path.exists():
            path.write_bytes(bytes(nbytes))

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
            payload = self._page[first : first + length]
            if sequence == 0:
                return 0, b""
            if written == sequence and zlib.crc32(payload) == checksum:
                return sequence, payload
            time.sleep(0.0001)  # two writers passed while we read; look again
        raise EnginePluginError(f"the page {self._path} cannot be read")

    def write(self, payload: bytes) -> None:
        """Replace the bytes; no other process may be writing.

        Raises:
            EnginePluginError: they do not fit.
        """
        if len(payload) > self._slot_bytes - _SLOT_HEADER.size:
            raise EnginePluginError(f"{len(payload)} bytes do not fit the page {self._path}")
        sequence = self._sequence[0] + 1
        slot = self._slot(sequence)
        _SLOT_HEADER.pack_into(self._page, slot, sequence, len(payload), zlib.crc32(payload))
        first = slot + _SLOT_HEADER.size
        self._page[first : first + len(payload)] = payload
        self._sequence[0] = sequence

    def _slot(self, sequence: int) -> int:
        return _FIRST_SLOT + self._slot_bytes * (sequence % 2)
