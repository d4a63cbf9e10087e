"""The memory that an agent has registered, and the checks that both ends' numbers must pass."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from engine_plugins.errors import PeerError, TransportError
from engine_plugins.weights.transport.base import Descriptors

__all__ = ["HOST", "RegionTable", "check_descriptors"]

HOST = -1
"""Device number of host memory."""


class RegionTable:
    """Registered regions by their start address; regions never overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._regions: dict[int, tuple[int, int]] = {}

    def add(self, address: int, nbytes: int, device: int) -> None:
        """Enter a region.

        Raises:
            TransportError: it is empty, has an impossible device, or overlaps another one.
        """
        if address <= 0 or nbytes <= 0 or device < HOST:
            raise TransportError(
                f"cannot register {nbytes} bytes at {address:#x} on device {device}",
                remedy="register memory that exists; the device is -1 for host memory",
            )
        at = bisect_right(self._starts, address)
        for start in self._starts[max(at - 1, 0) : at + 1]:
            if start < address + nbytes and address < start + self._regions[start][0]:
                raise TransportError(
                    f"{nbytes} bytes at {address:#x} overlap the {self._regions[start][0]} bytes "
                    f"registered at {start:#x}",
                    remedy="register each storage or arena once",
                )
        self._starts.insert(at, address)
        self._regions[address] = (nbytes, device)

    def remove(self, address: int) -> tuple[int, int]:
        """Take a region out and return its (bytes, device).

        Raises:
            TransportError: no region starts there.
        """
        if address not in self._regions:
            raise TransportError(
                f"no registered region starts at {address:#x}",
                remedy="deregister the address that was registered",
            )
        self._starts.remove(address)
        return self._regions.pop(address)

    def rows(self) -> list[tuple[int, int, int]]:
        """Every region as (address, bytes, device), by address."""
        return [(start, *self._regions[start]) for start in self._starts]

    def check_inside(
        self, whose: str, addresses: np.ndarray, lengths: np.ndarray, device: int
    ) -> None:
        """Check that every range lies inside one region of the given device.

        Args:
            whose: who registered the regions, for the message.
            addresses: [n] uint64 first bytes.
            lengths: [n] uint64 lengths in bytes.
            device: CUDA ordinal, or -1 for host memory.

        Raises:
            PeerError: a range does not; the text names the first one.
        """
        here = [row for row in self.rows() if row[2] == device]
        starts = np.array([row[0] for row in here], dtype=np.uint64)
        sizes = np.array([row[1] for row in here], dtype=np.uint64)
        at = np.searchsorted(starts, addresses, side="right") - 1
        inside = at >= 0
        found = np.maximum(at, 0)
        if len(here):
            offset = addresses - starts[found]
            room = sizes[found] - np.minimum(offset, sizes[found])
            inside &= lengths <= room
        if not inside.all():
            row = int(np.argmin(inside))
            raise PeerError(
                f"{whose}: {int(lengths[row])} bytes at {int(addresses[row]):#x} on device "
                f"{device} lie in none of its {len(here)} registered regions there; "
                "nothing was moved",
                remedy="the memory was freed or never registered: publish the source again",
            )


def check_descriptors(agent: str, descriptors: Descriptors) -> int:
    """Check the form of a transfer's descriptors and return its bytes.

    Raises:
        TransportError: not [n, 3] uint64, no rows, or a row without bytes.
        PeerError: a range runs past the end of the address space; NIXL's own check wraps around
            there and lets it pass.
    """
    if descriptors.dtype != np.uint64 or descriptors.ndim != 2 or descriptors.shape[1] != 3:
        raise TransportError(
            f"{agent}: descriptors must be [n, 3] uint64, not {descriptors.shape} "
            f"{descriptors.dtype}"
        )
    if not len(descriptors) or not descriptors[:, 2].all():
        raise TransportError(
            f"{agent}: a transfer needs descriptors, each of at least one byte; got "
            f"{len(descriptors)} rows, {int((descriptors[:, 2] == 0).sum())} of them empty",
            remedy="leave empty boxes out of the plan",
        )
    past_end = descriptors[:, :2].max(axis=1) > np.uint64(2**64 - 1) - descriptors[:, 2]
    if past_end.any():
        row = [hex(number) for number in descriptors[int(np.argmax(past_end))].tolist()]
        raise PeerError(
            f"{agent}: a range runs past the end of the address space (local address, remote "
            f"address, bytes: {', '.join(row)}); nothing was moved",
            remedy="publish the source again",
        )
    return int(descriptors[:, 2].sum())
