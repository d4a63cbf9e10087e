"""The live parameters of one engine rank as memory that peers may read and write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

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
        for region in self._registered:
            for (_, start), storage in region.storages.items():
                if start <= address and last <= start + storage.nbytes():
                    view = torch.empty(0, dtype=dtype, device=storage.device)
                    strides = [step // dtype.itemsize for step in strides_bytes]
                    return view.set_(storage, (address - start) // dtype.itemsize, shape, strides)
        raise TransportError(
            f"{prod(shape)} elements of {dtype} at {address:#x} lie in no live parameter",
            remedy="this is a fault of the plan: report it",
        )

    def close(self) -> None:
        """Take the registrations back; the parameters stay. Repeating it does nothing."""
        while self._registered:
            self._transport.deregister(self._registered.pop().address)
