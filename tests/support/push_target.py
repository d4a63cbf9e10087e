"""An engine rank's memory for a push: a copy of every region that the trainers have registered."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from engine_plugins.weights.boxes.dtypes import dtype_named
from engine_plugins.weights.contract.destinations import Destination, Writes
from engine_plugins.weights.contract.manifest import SourceManifest, numbers
from engine_plugins.weights.transport.in_memory import InMemoryTransport

__all__ = ["PushTarget"]

_serial = itertools.count()


class PushTarget:
    """Where the trainers of some manifests write, and the tensors that are there afterwards."""

    def __init__(self, manifests: Sequence[SourceManifest]) -> None:
        self.transport = InMemoryTransport(f"pushed-{next(_serial)}")
        self._manifests = manifests
        self._copies = [
            [
                torch.zeros(nbytes, dtype=torch.uint8)
                for nbytes in numbers(manifest.regions.nbytes).tolist()
            ]
            for manifest in manifests
        ]
        for copy in itertools.chain(*self._copies):
            self.transport.register(copy.data_ptr(), copy.nbytes, -1)

    def destinations(self) -> list[Destination]:
        """One rank, to which every trainer writes its regions whole."""
        metadata = self.transport.metadata()
        return [
            Destination(
                tp_rank=0,
                agent=self.transport.agent,
                agent_metadata=metadata,
                agent_metadata_sha256=hashlib.sha256(metadata).hexdigest(),
                writes={
                    manifest.agent: _writes(manifest, copies)
                    for manifest, copies in zip(self._manifests, self._copies, strict=True)
                },
            )
        ]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was written, by HF name."""
        written: dict[str, torch.Tensor] = {}
        for manifest, copies in zip(self._manifests, self._copies, strict=True):
            tensors = manifest.tensors
            for offered in map(manifest.box, range(manifest.box_count)):
                tensor, start, shape = offered.tensor, offered.start, offered.shape
                name, dtype = tensors.names[tensor], dtype_named(tensors.dtypes[tensor])
                empty = torch.zeros(manifest.tensor_shape(tensor), dtype=dtype)
                whole = written.setdefault(name, empty)
                box = torch.as_strided(
                    copies[offered.region].view(dtype),
                    shape,
                    [stride // dtype.itemsize for stride in offered.strides_bytes],
                    offered.offset_bytes // dtype.itemsize,
                )
                whole[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))] = box
        return written

    def close(self) -> None:
        """Trainers lose it."""
        self.transport.close()


def _writes(manifest: SourceManifest, copies: Sequence[torch.Tensor]) -> Writes:
    regions = manifest.regions
    rows = [
        (address, copy.data_ptr(), copy.nbytes)
        for address, copy in zip(numbers(regions.addresses).tolist(), copies, strict=True)
    ]
    devices = np.full(len(rows), -1, dtype=np.int32)
    return Writes.of(np.array(rows, dtype=np.uint64).reshape(-1, 3), devices, devices)
