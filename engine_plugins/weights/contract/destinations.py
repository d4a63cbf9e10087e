"""Where a trainer writes in a push: each engine rank's memory, as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt

from engine_plugins.errors import PlanError
from engine_plugins.weights.transport.base import Descriptors

__all__ = ["Destination", "Writes"]

_ADDRESS = np.dtype("<u8")
_DEVICE = np.dtype("<i4")


class Writes(msgspec.Struct, frozen=True, kw_only=True):
    """What one trainer process writes to one engine rank: columns of one row per descriptor.

    Addresses and lengths are little-endian uint64, devices little-endian int32 (a CUDA ordinal,
    or -1 for host memory, each in the numbering of the process that holds the memory).
    """

    local: bytes
    """Addresses in the trainer."""
    remote: bytes
    """Addresses in the engine rank."""
    nbytes: bytes
    local_devices: bytes
    remote_devices: bytes

    @classmethod
    def of(
        cls,
        descriptors: Descriptors,
        local_devices: npt.NDArray[np.int32],
        remote_devices: npt.NDArray[np.int32],
    ) -> Self:
        """Columns of [n, 3] uint64 descriptors (local, remote, bytes) and [n] int32 devices."""
        local, remote, nbytes = (column.astype(_ADDRESS).tobytes() for column in descriptors.T)
        return cls(
            local=local,
            remote=remote,
            nbytes=nbytes,
            local_devices=local_devices.astype(_DEVICE).tobytes(),
            remote_devices=remote_devices.astype(_DEVICE).tobytes(),
        )

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows."""
        return int(np.frombuffer(self.nbytes, _ADDRESS).sum())

    def by_devices(self) -> Iterator[tuple[int, int, Descriptors]]:
        """The rows of each pair of devices: (local, remote, descriptors [n, 3] uint64).

        Raises:
            PlanError: the columns are not of one length.
        """
        columns = (self.local, self.remote, self.nbytes)
        devices = (self.local_devices, self.remote_devices)
        rows_told = {len(column) / 8 for column in columns} | {len(each) / 4 for each in devices}
        if len(rows_told) != 1 or not rows_told.pop().is_integer():
            raise PlanError(
                "the columns of a push's writes are not of one length", remedy="connect again"
            )
        rows = np.stack([np.frombuffer(column, _ADDRESS) for column in columns], axis=1)
        local, remote = (np.frombuffer(column, _DEVICE) for column in devices)
        order = np.lexsort((remote, local))
        local, remote = local[order], remote[order]
        changes = np.flatnonzero((local[1:] != local[:-1]) | (remote[1:] != remote[:-1])) + 1
        for chosen in np.split(order, changes) if len(order) else []:
            yield int(local[0]), int(remote[0]), rows[chosen].astype(np.uint64)
            local, remote = local[len(chosen) :], remote[len(chosen) :]


class Destination(msgspec.Struct, frozen=True, kw_only=True):
    """One engine rank as the target of a push; bytes are base64 in JSON."""

    tp_rank: int
    agent: str
    """The rank's transport agent; the peer that an error will name."""
    agent_metadata: bytes
    agent_metadata_sha256: str
    """Of the metadata, in hexadecimal: compare before it reaches a transport."""
    writes: dict[str, Writes] = {}
    """What each trainer process writes, by the agent name in its manifest."""
