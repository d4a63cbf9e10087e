"""The live parameters of one engine rank as memory that peers may read and write."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import prod
from operator import add

import torch

from engine_plugins.errors import TransportError
from engine_plugins.weights.memory.source_memory import (
    HOST,
    Region,
    regions_of,
    warn_of_expandable_segments,
)
from engine_plugins.weights.transport.base import Transport

__all__ = ["LiveMemory"]


class LiveMemory:
    """Storages under live parameters, registered as whole storages and held until `close`.

    Args:
        tensors: the parameters, all on one device.
        transport: registers them; this must be closed before the transport is.

    Raises:
        TransportError: they lie on several devices, or the transport refused the memory.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], transport: Transport) -> None:
        self._regions = regions_of(tensors)
        self._transport = transport
        self._registered: list[Region] = []
        held = [item for region in self._regions for item in region.storages.items()]
        held.sort(key=lambda item: item[0])
        self._starts = [start for (_, start), _ in held]
        self._storages = [storage for _, storage in held]
        sizes = [storage.nbytes() for storage in self._storages]
        ends = accumulate(map(add, self._starts, sizes), max, initial=0)
        self._apart = [end <= start for start, end in zip(self._starts, ends, strict=False)]
        """Of each storage, whether no one before it reaches into it."""
        devices = {region.device for region in self._regions}
        if len(devices) > 1:
            raise TransportError(
                f"the live parameters of this rank lie on several devices: {sorted(devices)}",
                remedy="set ENGINE_PLUGINS_DIRECT_LANDING=false",
            )
        self.device = devices.pop() if devices else HOST
        warn_of_expandable_segments(self._regions)
        try:
            for region in self._regions:
                transport.register(region.address, region.nbytes, region.device)
                self._registered.append(region)
        except BaseException:
            self.close()
            raise

    @property
    def regions(self) -> Sequence[Region]:
        """What is registered."""
        return self._registered

    def strided(
        self, address: int, shape: Sequence[int], strides_bytes: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """A view of live memory.

        Raises:
            TransportError: it would leave the registered memory.
        """
        steps = zip(shape, strides_bytes, strict=True)
        last = address + sum((size - 1) * step for size, step in steps) + dtype.itemsize
        for at in reversed(range(bisect_right(self._starts, address))):
            start, storage = self._starts[at], self._storages[at]
            if last <= start + storage.nbytes():
                view = torch.empty(0, dtype=dtype, device=storage.device)
                strides = [step // dtype.itemsize for step in strides_bytes]
                return view.set_(storage, (address - start) // dtype.itemsize, shape, strides)
            if self._apart[at]:
                break  # and those before it end before it begins
        raise TransportError(
            f"{prod(shape)} elements of {dtype} at {address:#x} lie in no live parameter",
            remedy="this is a fault of the plan: report it",
        )

    def close(self) -> None:
        """Take the registrations back; the parameters stay. Repeating it does nothing."""
        self._starts, self._storages, self._apart = [], [], []
        while self._registered:
            self._transport.deregister(self._registered.pop().address)
