"""One registered buffer that weights land in, and what becomes of it when a read goes wrong."""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Callable, Sequence
from math import prod

import torch

from engine_plugins.errors import TransportError, UnsupportedError
from engine_plugins.weights.hardware.cuda_pool import PlainCudaPool
from engine_plugins.weights.hardware.expandable_segments import WHY_NOT, asked_for
from engine_plugins.weights.transport import quarantine
from engine_plugins.weights.transport.base import Transport
from engine_plugins.weights.transport.regions import HOST

__all__ = ["Arena"]

logger = logging.getLogger(__name__)


class Arena:
    """One page-aligned buffer, registered with a transport as one region.

    Host memory is reserved, not resident: a page costs memory once something is written to it.
    Huge pages are asked for, so that is 2 MiB at a time where the kernel gives them. (A wire that
    pins pages, as RDMA does, makes all of it resident at registration.)

    CUDA memory comes from torch's allocator, or, with a warning, from plain cudaMalloc where that
    allocator uses expandable segments.

    Around host memory more addresses may be reserved, which are neither registered nor ever
    resident: views may reach over them, as long as nobody writes through that part.

    Args:
        nbytes: its size in bytes.
        transport: registers it; the arena must be closed before the transport is.
        device: `cpu`, or a CUDA device such as `cuda:0`.
        margins: bytes that views may reach past the arena's begin and past its end; on the CPU.

    Raises:
        TransportError: no bytes, or the transport refused the memory.
        UnsupportedError: a device that is not here, or expandable segments and no way to have a
            pool beside them (see `PlainCudaPool`).
    """

    def __init__(
        self,
        nbytes: int,
        transport: Transport,
        device: str = "cpu",
        margins: tuple[int, int] = (0, 0),
    ) -> None:
        if nbytes <= 0:
            raise TransportError(f"an arena of {nbytes} bytes is of no use", remedy="size it > 0")
        self._nbytes = nbytes
        self._transport = transport
        where = _checked(device)
        self._pool = _pool_if_needed(where, nbytes)
        self._front, back = (-(-margin // mmap.PAGESIZE) * mmap.PAGESIZE for margin in margins)
        self._buffer: torch.Tensor | None = (
            _reserve(self._front, nbytes, back)
            if where.type == "cpu"
            else _allocate(nbytes, where, self._pool)
        )
        self._state = "open"
        self._address = self._buffer.data_ptr() + self._front
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
        first = self._front + offset_bytes
        return buffer[first : self._front + end].view(dtype).view(tuple(shape))

    def strided(
        self,
        offset_bytes: int,
        shape: Sequence[int],
        strides_bytes: Sequence[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """A view of the arena with strides of its own.

        Raises:
            TransportError: as for `tensor`.
        """
        steps = zip(shape, strides_bytes, strict=True)
        last = sum((size - 1) * step for size, step in steps) // dtype.itemsize
        strides = [step // dtype.itemsize for step in strides_bytes]
        flat = self.tensor(offset_bytes, (last + 1,), dtype)
        return flat.as_strided(tuple(shape), strides, flat.storage_offset())

    def around(
        self,
        offset_bytes: int,
        shape: Sequence[int],
        strides_bytes: Sequence[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """A view that may reach into the margins, of which a part alone has its place here.

        Raises:
            TransportError: as for `tensor`, of the arena with its margins.
        """
        buffer = self._usable()
        item = dtype.itemsize
        steps = zip(shape, strides_bytes, strict=True)
        first = self._front + offset_bytes
        end = first + sum((size - 1) * step for size, step in steps) + item
        if not 0 <= first <= end <= len(buffer) or first % item:
            raise TransportError(
                f"a view of {tuple(shape)} {dtype} at byte {offset_bytes} reaches out of an arena "
                f"of {self._nbytes} bytes and its margins",
                remedy="this is a fault of the plan: report it",
            )
        flat = buffer[: len(buffer) // item * item].view(dtype)
        return flat.as_strided(
            tuple(shape), [step // item for step in strides_bytes], first // item
        )

    def close(self) -> None:
        """Deregister and free. Views that are still held keep the memory, not the registration.

        Does nothing to an arena that is closed or quarantined.
        """
        if self._state != "open":
            return
        self._state = "closed"
        try:
            self._transport.deregister(self._address)  # before its memory can be another's
        finally:
            self._buffer = None
            if self._pool is not None:
                self._pool.close()

    def quarantine(
        self, ended: Callable[[], bool] = lambda: False, *, ends_with_agent: bool = True
    ) -> None:
        """Give the arena up after a transfer that timed out: late bytes may still land in it.

        The memory stays allocated and registered until none can, see `transport.quarantine`.

        Args:
            ended: whether it is known that no more bytes will come.
            ends_with_agent: whether none can come once the agent is closed.
        """
        if self._state != "open" or self._buffer is None:
            return
        self._state, held = "quarantined", [self._buffer]
        self._buffer = None
        pool = self._pool

        def free() -> None:
            held.clear()
            if pool is not None:
                pool.close()

        quarantine.keep(
            self._transport,
            self._address,
            self._nbytes,
            free=free,
            ended=ended,
            ends_with_agent=ends_with_agent,
        )
        logger.warning(
            "quarantined a receive buffer of %.3f GiB at %#x: bytes may still come into it; "
            "%.3f GiB of this process cannot be used now",
            self._nbytes / 2**30,
            self._address,
            quarantine.quarantined_bytes() / 2**30,
        )

    def _usable(self) -> torch.Tensor:
        if self._buffer is None:
            raise TransportError(
                f"the arena of {self._nbytes} bytes is {self._state} and must not be used",
                remedy="make a new arena",
            )
        return self._buffer


def _checked(device: str) -> torch.device:
    """A device that memory can be had on, here."""
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise UnsupportedError(f"{device!r} is no device: {error}") from error
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if where.type != "cpu" and (where.type != "cuda" or (where.index or 0) >= there):
        raise UnsupportedError(
            f"no arena on {device}: this process has the CPU and {there} CUDA devices",
            remedy="use one of these",
        )
    return where


def _pool_if_needed(device: torch.device, nbytes: int) -> PlainCudaPool | None:
    asked = asked_for() if device.type == "cuda" else None
    if asked is None:
        return None
    logger.warning(
        "a receive buffer of %.3f GiB on %s comes from plain cudaMalloc, outside torch's own "
        "memory, because of %s: %s",
        nbytes / 2**30,
        device,
        asked,
        WHY_NOT,
    )
    return PlainCudaPool(device)


def _allocate(nbytes: int, device: torch.device, pool: PlainCudaPool | None) -> torch.Tensor:
    if pool is not None:
        return pool.empty((nbytes,), torch.uint8)
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _reserve(front: int, nbytes: int, back: int) -> torch.Tensor:
    """[front + nbytes + back] bytes of host memory, of which the margins cost addresses alone."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    reserved = mmap.mmap(-1, front + nbytes + back, flags=flags)
    with contextlib.suppress(OSError):
        reserved.madvise(mmap.MADV_HUGEPAGE, front, nbytes)
    return torch.frombuffer(reserved, dtype=torch.uint8)


def _device_number(buffer: torch.Tensor) -> int:
    return HOST if buffer.device.type == "cpu" else buffer.get_device()
