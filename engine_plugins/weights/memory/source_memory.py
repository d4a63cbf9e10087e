"""The memory under a trainer's tensors: which of it peers can read, and in which regions."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from engine_plugins.errors import SourceError
from engine_plugins.weights.hardware.cuda_pool import PlainCudaPool
from engine_plugins.weights.hardware.expandable_segments import (
    WHY_NOT,
    asked_for,
    expandable_ranges,
)

__all__ = [
    "Region",
    "copy_memory",
    "cuda_segments",
    "is_readable",
    "regions_of",
    "storage_key",
    "strides_bytes",
    "warn_of_expandable_segments",
]

logger = logging.getLogger(__name__)

HOST = -1
"""Device number of host memory, on the wire as in manifests."""

Segment = tuple[int, range]
"""A device, and addresses on it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Region:
    """One range of memory to register, and the storages in it, which it keeps alive."""

    device: int
    """CUDA ordinal, or -1 for host memory."""
    address: int
    nbytes: int
    storages: dict[tuple[int, int], torch.UntypedStorage]
    """By `storage_key`."""

    @property
    def order(self) -> tuple[int, int]:
        """Regions are listed by device, then address."""
        return (self.device, self.address)


def storage_key(tensor: torch.Tensor) -> tuple[int, int]:
    """Name the storage under a tensor: (device, address)."""
    device = tensor.device.index if tensor.is_cuda else HOST
    return (device, tensor.untyped_storage().data_ptr())


def is_readable(name: str, data: torch.Tensor) -> bool:
    """Say whether peers can read a box in place, or need a contiguous copy of it.

    In place needs a contiguous last axis; the other axes may have any strides.

    Raises:
        SourceError: the tensor has no plain memory on a device that transports reach.
    """
    if data.layout != torch.strided or data.device.type not in ("cpu", "cuda"):
        raise SourceError(
            f"{name}: a {data.layout} tensor on {data.device} has no memory that can be offered",
            remedy="offer dense tensors on the CPU or a CUDA device",
        )
    if not data.numel():
        return True
    storage = data.untyped_storage()
    last = data.data_ptr() + sum(strides_bytes(data, steps=True)) + data.element_size()
    if not data.data_ptr() or last > storage.data_ptr() + storage.nbytes():
        raise SourceError(
            f"{name}: a {type(data).__name__} of shape {tuple(data.shape)} whose storage has "
            f"{storage.nbytes()} bytes has no memory of its own now",
            remedy="offer real local tensors: a DTensor's to_local(), a sharded or offloaded "
            "parameter once it is gathered",
        )
    if data.is_conj() or data.is_neg():
        return False
    return data.ndim == 0 or data.shape[-1] == 1 or data.stride(-1) == 1


def strides_bytes(data: torch.Tensor, *, steps: bool = False) -> tuple[int, ...]:
    """Strides in bytes; of an axis with one index, what a contiguous tensor would have.

    With `steps`, the distance from the first to the last index of every axis instead.
    """
    item = data.element_size()
    if steps:
        return tuple(
            (extent - 1) * stride * item
            for extent, stride in zip(data.shape, data.stride(), strict=True)
        )
    strides: list[int] = []
    natural = item
    for extent, stride in zip(reversed(data.shape), reversed(data.stride()), strict=True):
        strides.append(natural if extent == 1 else stride * item)
        natural = strides[-1] * extent
    return tuple(reversed(strides))


def cuda_segments() -> list[Segment]:
    """Ranges that torch's CUDA allocator had from cudaMalloc, each in one piece."""
    if not torch.cuda.is_initialized():
        return []
    return [
        (segment["device"], range(segment["address"], segment["address"] + segment["total_size"]))
        for segment in torch.cuda.memory_snapshot()
        if not segment.get("is_expandable")
    ]


def regions_of(
    tensors: Iterable[torch.Tensor], segments: Sequence[Segment] | None = None
) -> list[Region]:
    """Cover the storages of tensors with as few regions as there are separate allocations.

    Storages that overlap (two views of one foreign buffer) become one region, and so do storages
    of one CUDA segment, with what lies between them. Neighbours that only touch do not: they may
    be separate allocations, which a network card refuses as one.

    Args:
        tensors: whose storages are covered; those without elements have none.
        segments: as `cuda_segments` gives them, which is the default.

    Returns:
        Regions without overlap, ordered by device, then address.
    """
    storages: dict[tuple[int, int], torch.UntypedStorage] = {}
    for tensor in tensors:
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        known = storages.get(key)
        if tensor.numel() and (known is None or known.nbytes() < storage.nbytes()):
            storages[key] = storage
    on_cuda = any(device != HOST for device, _ in storages)
    places = _Segments((cuda_segments() if on_cuda else []) if segments is None else segments)
    regions: list[Region] = []
    for (device, address), storage in sorted(storages.items(), key=lambda item: item[0]):
        last = regions[-1] if regions else None
        end = address + storage.nbytes()
        held = {(device, address): storage}
        if last is not None and device == last.device:
            overlap = address < last.address + last.nbytes
            if overlap or places.share(device, last.address, address):
                end = max(last.address + last.nbytes, end)
                address = last.address
                held = {**regions.pop().storages, **held}
        regions.append(Region(device=device, address=address, nbytes=end - address, storages=held))
    return regions


class _Segments:
    """Which segment an address lies in."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._sorted = sorted(segments, key=lambda each: (each[0], each[1].start))
        self._starts = [(device, addresses.start) for device, addresses in self._sorted]

    def share(self, device: int, one: int, other: int) -> bool:
        """Whether two addresses of a device, the second the higher, lie in the same."""
        index = bisect_right(self._starts, (device, one)) - 1
        if index < 0 or self._sorted[index][0] != device:
            return False
        return one in self._sorted[index][1] and other in self._sorted[index][1]


def copy_memory(data: torch.Tensor) -> torch.Tensor:
    """Contiguous memory of a tensor's shape and dtype, on its device, that a wire can register.

    CUDA memory is plain cudaMalloc's where torch's own is of expandable segments; what is freed
    of it serves the next copies.

    Raises:
        UnsupportedError: there is no such memory (see `PlainCudaPool`).
    """
    if data.is_cuda and asked_for() is not None:
        return _pool(data.device).empty(data.shape, data.dtype)
    return torch.empty(data.shape, dtype=data.dtype, device=data.device)


def warn_of_expandable_segments(regions: Sequence[Region]) -> None:
    """Warn of CUDA memory in expandable segments, which network cards cannot read.

    Where torch's allocator can list its segments, they are looked at; elsewhere its settings are.
    """
    on_cuda = [region for region in regions if region.device != HOST]
    asked = asked_for() if on_cuda else None
    if torch.cuda.is_initialized():
        ranges = expandable_ranges() if on_cuda else []
        on_cuda = [r for r in on_cuda if any(r.address in each for each in ranges)]
    elif asked is None:
        return
    if on_cuda:
        logger.warning(
            "%.3f GiB of the memory offered on CUDA devices is of expandable segments (%s): %s. "
            "Start with expandable_segments:False, or allocate what is offered within "
            "PlainCudaPool.active()",
            sum(region.nbytes for region in on_cuda) / 2**30,
            asked or "no longer asked for",
            WHY_NOT,
        )


@cache
def _pool(device: torch.device) -> PlainCudaPool:
    return PlainCudaPool(device)
