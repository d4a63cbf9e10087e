"""What the ranks of a large FSDP2 job would offer: manifests only, of memory that is not there.

Each tensor is cut on one axis as torch cuts it: equal shares, the last ones shorter or empty; every
rank names all tensors, and has boxes of those that it holds something of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.contract.manifest import (
    FORMAT,
    BoxColumns,
    RegionColumns,
    SourceManifest,
    TensorColumns,
    packed,
)

__all__ = ["simulated_fsdp"]


def simulated_fsdp(
    tensors: Sequence[LogicalTensor],
    *,
    ranks: int,
    replicas: int = 1,
    axis: int = 0,
    address: int = 1 << 40,
) -> list[SourceManifest]:
    """Manifests of `ranks` times `replicas` processes; the shards of each replica are the same.

    Args:
        tensors: the model's, of one dtype.
        ranks: that share each tensor.
        replicas: of them (HSDP).
        axis: that is cut; of a tensor without it, the first.
        address: where every rank's memory would begin.
    """
    axes = max(len(tensor.shape) for tensor in tensors)
    ndims = np.array([len(tensor.shape) for tensor in tensors])
    shapes = np.array([(*(1,) * (axes - len(t.shape)), *t.shape) for t in tensors], np.int64)
    each, itemsize = np.arange(len(tensors)), tensors[0].dtype.itemsize
    cut = axes - ndims + np.minimum(axis, ndims - 1)
    share = -(-shapes[each, cut] // ranks)
    columns = TensorColumns(
        names=[tensor.name for tensor in tensors],
        dtypes=[str(tensors[0].dtype).removeprefix("torch.")] * len(tensors),
        ndims=ndims.tobytes(),
        shapes=shapes.tobytes(),
    )
    made: list[SourceManifest] = []
    for number in range(ranks * replicas):
        first = share * (number % ranks)
        extent = np.clip(shapes[each, cut] - first, 0, share)
        rows = np.flatnonzero(extent)
        start, shape = np.zeros((len(rows), axes), np.int64), shapes[rows].copy()
        start[np.arange(len(rows)), cut[rows]] = first[rows]
        shape[np.arange(len(rows)), cut[rows]] = extent[rows]
        inner = np.concatenate([shape[:, 1:], np.full((len(rows), 1), itemsize)], axis=1)
        nbytes = shape.prod(axis=1) * itemsize
        metadata = f"agent of rank {number}".encode()
        made.append(
            SourceManifest(
                format=FORMAT,
                source=f"trainer rank {number} of {ranks * replicas} (simulated)",
                transport="in_memory",
                agent=f"simulated-{number}",
                agent_metadata=metadata,
                agent_metadata_sha256=hashlib.sha256(metadata).hexdigest(),
                model={},
                version_word=address,
                axes=axes,
                tensors=columns,
                regions=RegionColumns(
                    addresses=packed([address]),
                    nbytes=packed([max(int(nbytes.sum()), 1)]),
                    devices=packed([-1]),
                ),
                boxes=BoxColumns(
                    tensors=rows.tobytes(),
                    starts=start.tobytes(),
                    shapes=shape.tobytes(),
                    regions=np.zeros(len(rows), np.int64).tobytes(),
                    offsets_bytes=(np.cumsum(nbytes) - nbytes).tobytes(),
                    strides_bytes=inner[:, ::-1].cumprod(axis=1)[:, ::-1].tobytes(),
                ),
                host=f"host-{number // 8}",
                global_rank=number,
            )
        )
    return made
