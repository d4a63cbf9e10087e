"""Read what a manifest offers, with nothing but the manifest and the wire."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine_plugins.weights.contract.manifest import SourceManifest, numbers
from engine_plugins.weights.transport.in_memory import InMemoryTransport

__all__ = ["pull"]


def pull(manifest: SourceManifest) -> dict[str, torch.Tensor]:
    """Read every box as an engine would: through addresses of the manifest, over the wire."""
    engine = InMemoryTransport("engine-0")
    engine.add_peer(manifest.agent, manifest.agent_metadata)
    tensors, addresses = manifest.tensors, numbers(manifest.regions.addresses)
    pulled: dict[str, torch.Tensor] = {}
    try:
        for row, name in enumerate(tensors.names):
            dtype = getattr(torch, tensors.dtypes[row])
            pulled[name] = torch.zeros(manifest.tensor_shape(row), dtype=dtype)
        for offered in map(manifest.box, range(manifest.box_count)):
            first = int(addresses[offered.region]) + offered.offset_bytes
            name = tensors.names[offered.tensor]
            box = _read(
                engine,
                manifest.agent,
                first,
                offered.shape,
                offered.strides_bytes,
                pulled[name].dtype,
            )
            place = tuple(
                slice(a, a + n) for a, n in zip(offered.start, offered.shape, strict=True)
            )
            pulled[name][place] = box
    finally:
        engine.close()
    return pulled


def _read(
    engine: InMemoryTransport,
    agent: str,
    first: int,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    target = torch.zeros(list(shape), dtype=dtype)
    run = (shape[-1] if shape else 1) * dtype.itemsize
    outer = np.indices(shape[:-1]).reshape(len(shape[:-1]), -1) if len(shape) > 1 else None
    offsets = [0] if outer is None else (np.array(strides[:-1]) @ outer).tolist()
    rows = [(target.data_ptr() + n * run, first + offset, run) for n, offset in enumerate(offsets)]
    engine.register(target.data_ptr(), target.nbytes, -1)
    read = engine.prepare_read(
        agent, np.array(rows, dtype=np.uint64), local_device=-1, remote_device=-1
    )
    read.post()
    assert read.done()
    read.release()
    engine.deregister(target.data_ptr())
    return target
