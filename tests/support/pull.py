"""Read what a manifest offers, with nothing but the manifest and the wire."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine_plugins.weights.manifest import SourceManifest
from engine_plugins.weights.transport.in_memory import InMemoryTransport

__all__ = ["pull"]


def pull(manifest: SourceManifest) -> dict[str, torch.Tensor]:
    """Read every box as an engine would: through addresses of the manifest, over the wire."""
    engine = InMemoryTransport("engine-0")
    engine.add_peer(manifest.agent, manifest.agent_metadata)
    tensors, boxes, regions = manifest.tensors, manifest.boxes, manifest.regions
    pulled: dict[str, torch.Tensor] = {}
    try:
        for name, dtype, shape in zip(tensors.names, tensors.dtypes, tensors.shapes, strict=True):
            pulled[name] = torch.zeros(shape, dtype=getattr(torch, dtype))
        for row, tensor in enumerate(boxes.tensors):
            region = boxes.regions[row]
            first = regions.addresses[region] + boxes.offsets_bytes[row]
            name = tensors.names[tensor]
            box = _read(
                engine,
                manifest.agent,
                first,
                boxes.shapes[row],
                boxes.strides_bytes[row],
                pulled[name].dtype,
            )
            place = tuple(
                slice(a, a + n) for a, n in zip(boxes.starts[row], boxes.shapes[row], strict=True)
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
