"""Small pieces that go side by side in an engine's memory: gathered here, and written as one.

A piece costs its descriptor, some microseconds whatever its size; a copy of it beside its
neighbours costs less up to a size that was measured (docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes

import numpy as np

from engine_plugins.weights.memory.arena import Arena
from engine_plugins.weights.transport.base import Descriptors, Transport

__all__ = ["GATHERED_BYTES", "SmallWrites"]

GATHERED_BYTES = 4096
"""The largest piece that is gathered."""
FEWEST = 2
"""Pieces that are worth a copy: one alone is written from where it lies."""


class SmallWrites:
    """Ranges of host memory to write, with small neighbours gathered in a slot of ours.

    Args:
        rows: [n, 3] uint64 (local address, remote address, bytes) to one peer.
        transport: registers the slot.

    Attributes:
        rows: [m, 3] what is written instead, by remote address.
        gathered: how many of the ranges are copied first.

    Raises:
        TransportError: the slot cannot be registered.
    """

    def __init__(self, rows: Descriptors, transport: Transport) -> None:
        rows = rows[np.argsort(rows[:, 1], kind="stable")]
        joins = np.zeros(len(rows), np.bool_)
        small = rows[:, 2] <= GATHERED_BYTES
        joins[1:] = small[1:] & small[:-1] & (rows[:-1, 1] + rows[:-1, 2] == rows[1:, 1])
        joins[1:] &= rows[:-1, 0] + rows[:-1, 2] != rows[1:, 0]  # those are one range already
        first = np.flatnonzero(~joins)
        counts = np.diff(np.append(first, len(rows)))
        copied = np.repeat(counts >= FEWEST, counts)
        self._copies = rows[copied]
        self.gathered = len(self._copies)
        self._slot = Arena(int(self._copies[:, 2].sum()), transport) if self.gathered else None
        if self._slot is not None:
            sizes = self._copies[:, 2]
            starts = np.concatenate([np.zeros(1, np.uint64), sizes.cumsum()[:-1]])
            self._places = starts + np.uint64(self._slot.address)
            rows = rows.copy()
            rows[copied, 0] = self._places
        self.rows: Descriptors = rows[first]
        self.rows[:, 2] = np.add.reduceat(rows[:, 2], first) if len(rows) else 0

    def gather(self) -> None:
        """Copy the small ranges as they are now."""
        if self._slot is not None:
            sources, sizes = self._copies[:, 0].tolist(), self._copies[:, 2].tolist()
            for place, source, size in zip(self._places.tolist(), sources, sizes, strict=True):
                ctypes.memmove(place, source, size)

    def close(self) -> None:
        """Free the slot."""
        if self._slot is not None:
            self._slot.close()

    def quarantine(self) -> None:
        """Give up the slot without freeing it: a write that timed out may still read it."""
        if self._slot is not None:
            self._slot.quarantine()
