"""What the ranks of a large Megatron job would offer: manifests only, of memory that is not there.

Every rank has one region with its shards one behind the other, in the checkpoint's order. What is
cut, and where, is as Megatron does it; which shards share an allocation is not simulated.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.contract.manifest import (
    FORMAT,
    BoxColumns,
    RegionColumns,
    SourceManifest,
    TensorColumns,
    packed,
)

__all__ = ["SimulatedJob"]

_AXES = 2
_ROWS = re.compile(r"(embed_tokens|lm_head|[qkv]_proj|[qk]v?_b_proj|gate_proj|up_proj)\.weight$")
_COLUMNS = re.compile(r"(o_proj|down_proj)\.weight$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")

Table = npt.NDArray[np.int64]


class SimulatedJob:
    """A job of `ranks` processes: dense tensors over `tp`, whole experts over `ep`.

    Args:
        tensors: the model's, of one dtype and at most two axes; what is not cut, every rank has.
        ranks: in Megatron's order: tensor parallel fastest, pipeline slowest; those of one stage
            are split anew for experts.
        pp: pipeline stages of equally many layers; what is of no layer lies in the first or last.
        region_address: where every rank's memory would begin.
    """

    def __init__(
        self,
        tensors: Sequence[LogicalTensor],
        *,
        ranks: int,
        tp: int,
        ep: int,
        pp: int = 1,
        region_address: int = 1 << 40,
    ) -> None:
        self._names = np.array([tensor.name for tensor in tensors], dtype=object)
        self._ndims = np.array([len(tensor.shape) for tensor in tensors], dtype=np.int64)
        self._shapes = np.array([_aligned(tensor.shape) for tensor in tensors], dtype=np.int64)
        self._experts = np.array([_expert(tensor.name) for tensor in tensors], dtype=np.int64)
        self._axes = np.array([_cut_axis(tensor.name) for tensor in tensors], dtype=np.int64)
        self._dtype = str(tensors[0].dtype).removeprefix("torch.")
        self._itemsize = tensors[0].dtype.itemsize
        self._ranks, self._tp, self._ep, self._pp = ranks, tp, ep, pp
        layers = np.array([_layer(tensor.name) for tensor in tensors], dtype=np.int64)
        count = int(layers.max()) + 1
        first = np.arange(len(tensors)) < np.argmax(layers >= 0)
        outside = np.where(first, 0, pp - 1)
        self._stage = np.where(layers < 0, outside, layers * pp // max(count, 1))
        self._address = region_address

    def manifests(self) -> list[SourceManifest]:
        """One for each rank."""
        return [self._manifest(rank) for rank in range(self._ranks)]

    def _manifest(self, rank: int) -> SourceManifest:
        count = int(self._experts.max()) + 1
        stage, within = divmod(rank, self._ranks // self._pp)
        own = np.maximum(self._experts, 0) * self._ep // max(count, 1) == within % self._ep
        rows = np.flatnonzero(((self._experts < 0) | own) & (self._stage == stage))
        start, shape = self._boxes(rows, rank % self._tp)
        nbytes = shape.prod(axis=1) * self._itemsize
        offsets = np.cumsum(nbytes) - nbytes
        strides = np.stack(
            [shape[:, 1] * self._itemsize, np.full(len(rows), self._itemsize)], axis=1
        )
        metadata = f"agent of rank {rank}".encode()
        return SourceManifest(
            format=FORMAT,
            source=f"trainer rank {rank} of {self._ranks} (simulated)",
            transport="in_memory",
            agent=f"simulated-{rank}",
            agent_metadata=metadata,
            agent_metadata_sha256=hashlib.sha256(metadata).hexdigest(),
            model={},
            version_word=self._address,
            axes=_AXES,
            tensors=TensorColumns(
                names=self._names[rows].tolist(),
                dtypes=[self._dtype] * len(rows),
                ndims=self._ndims[rows].tobytes(),
                shapes=self._shapes[rows].tobytes(),
            ),
            regions=RegionColumns(
                addresses=packed([self._address]),
                nbytes=packed([int(nbytes.sum())]),
                devices=packed([-1]),
            ),
            boxes=BoxColumns(
                tensors=np.arange(len(rows)).tobytes(),
                starts=start.tobytes(),
                shapes=shape.tobytes(),
                regions=np.zeros(len(rows), np.int64).tobytes(),
                offsets_bytes=offsets.tobytes(),
                strides_bytes=strides.tobytes(),
            ),
            host=f"host-{rank // 8}",
            global_rank=rank,
        )

    def _boxes(self, rows: Table, tp_rank: int) -> tuple[Table, Table]:
        """[n, 2] first index and shape of a rank's boxes."""
        shape, start = self._shapes[rows].copy(), np.zeros((len(rows), _AXES), np.int64)
        for axis in range(_AXES):
            cut = (self._axes[rows] == axis) & (self._experts[rows] < 0)
            shape[cut, axis] //= self._tp
            start[cut, axis] = shape[cut, axis] * tp_rank
        return start, shape


def _aligned(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*(1,) * (_AXES - len(shape)), *shape)


def _expert(name: str) -> int:
    found = _EXPERT.search(name)
    return int(found[1]) if found else -1


def _layer(name: str) -> int:
    found = _LAYER.search(name)
    return int(found[1]) if found else -1


def _cut_axis(name: str) -> int:
    if _ROWS.search(name):
        return 0
    return 1 if _COLUMNS.search(name) else -1
