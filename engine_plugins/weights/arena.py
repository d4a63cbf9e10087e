"""One registered buffer that weights land in, and what becomes of it when a read goes wrong."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from collections.abc import Sequence
from math import prod

import torch

from engine_plugins.errors import TransportError, UnsupportedError
from engine_plugins.weights.transport.base import Transport
from engine_plugins.weights.transport.regions import HOST

__all__ = ["Arena", "quarantined_bytes"]

logger = logging.getLogger(__name__)

_quarantined: list[torch.Tensor] = []


def quarantined_bytes() -> int:
    """Bytes that timed-out reads have made unusable until this process ends."""
    return sum(buffer.nbytes for buffer in _quarantined)


class Arena:
    """One page-aligned buffer, registered with a transport as one region.

    Host memory is reserved, not resident: a page costs memory once something is written to it.
    Huge pages are asked for, so that is 2 MiB at a time where the kernel gives them. (A wire that
    pins pages, as RDMA does, makes all of it resident at registration.)

    Args:
        nbytes: its size in bytes.
        transport: registers it; the arena must be closed before the transport is.
        device: `cpu`, or a CUDA device such as `cuda:0`.

    Raises:
        TransportError: no bytes, or the transport refused the memory.
        UnsupportedError: CUDA memory while the allocator uses expandable segments.
    """

    def __init__(self, nbytes: int, transport: Transport, device: str = "cpu") -> None:
        if nbytes <= 0:
            raise TransportError(f"an arena of {nbytes} bytes is of no use", remedy="size it > 0")
        self._nbytes = nbytes
        self._transport = transport
        self._buffer: torch.Tensor | None = _allocate(nbytes, torch.device(device))
        self._state = "open"
        self._address = self._buffer.data_ptr()
        transport.register(self._address, nbytes, _device_number(self._buffer))

    @property
    def nbytes(self) -> int:
        """Size in bytes, also after `close`."""
        return self._nbytes

    @property
    def address(self) -> int:
        """Address of the first byte.

        Raises:
            TransportError: the arena is closed or quarantined.
        """
        self._usable()
        return self._address

    def tensor(self, offset_bytes: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous view of the arena; what is read into the arena shows in it.

        Raises:
            TransportError: the view would leave the arena or break the dtype's alignment, or the
                arena is closed or quarantined.
        """
        buffer = self._usable()
        end = offset_bytes + prod(shape) * dtype.itemsize
        if not 0 <= offset_bytes <= end <= self._nbytes or offset_bytes % dtype.itemsize:
            raise TransportError(
                f"a view of {tuple(shape)} {dtype} at byte {offset_bytes} does not lie aligned "
                f"inside an arena of {self._nbytes} bytes",
                remedy="this is a fault of the plan: report it",
            )
        return buffer[offset_bytes:end].view(dtype).view(tuple(shape))

    def close(self) -> None:
        """Deregister and free. Views that are still held keep the memory, not the registration.

        Does nothing to an arena that is closed or quarantined.
        """
        if self._state != "open":
            return
        self._state, self._buffer = "closed", None
        self._transport.deregister(self._address)

    def quarantine(self) -> None:
        """Give the arena up after a read that timed out: late bytes may still land in it.

        The memory stays allocated and registered until the process ends, and is never used again.
        """
        if self._state != "open" or self._buffer is None:
            return
        _quarantined.append(self._buffer)
        self._state, self._buffer = "quarantined", None
        logger.warning(
            "quarantined a receive buffer of %.3f GiB at %#x: a read into it may still be under "
            "way; %.3f GiB are lost until this process ends",
            self._nbytes / 2**30,
            self._address,
            quarantined_bytes() / 2**30,
        )

    def _usable(self) -> torch.Tensor:
        if self._buffer is None:
            raise TransportError(
                f"the arena of {self._nbytes} bytes is {self._state} and must not be used",
                remedy="make a new arena",
            )
        return self._buffer


def _allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        reserved = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            reserved.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(reserved, dtype=torch.uint8)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(name, "").lower():
            raise UnsupportedError(
                f"{name} turns on expandable segments: network cards cannot walk such memory, "
                "it registers and then fails at the first transfer",
                remedy=f"take expandable_segments out of {name}, or use a host arena",
            )
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _device_number(buffer: torch.Tensor) -> int:
    return HOST if buffer.device.type == "cpu" else buffer.get_device()
