"""The whole tensors that sources speak of, agreed upon by all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine_plugins.errors import PlanError
from engine_plugins.weights.boxes.dtypes import dtype_named
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.contract.manifest import SourceManifest, numbers
from engine_plugins.weights.contract.manifest_checks import MAX_RANK
from engine_plugins.weights.planning.distinct import by_tensors

__all__ = ["logical_tensors"]

_DTYPE, _NDIM = 0, 1

Facts = npt.NDArray[np.int64]
"""[n, 2 + MAX_RANK]: the dtype by number, axes, and the shape, aligned at the right."""


def logical_tensors(manifests: Sequence[SourceManifest]) -> list[LogicalTensor]:
    """The whole tensors that the sources speak of, in their order, each once.

    Raises:
        PlanError: two sources give one tensor another shape or dtype.
    """
    number: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    known: Facts = np.empty((0, 2 + MAX_RANK), np.int64)
    for manifest in by_tensors(manifests)[0]:
        names, facts, before = manifest.tensors.names, _facts(manifest, dtypes), len(number)
        rows = np.fromiter((number.setdefault(name, len(number)) for name in names), np.int64)
        if len(number) > len(known):
            known = np.concatenate([known, np.empty((len(number), 2 + MAX_RANK), np.int64)])
        new = rows >= before
        known[rows[new]] = facts[new]
        unlike = (known[rows] != facts).any(axis=1)
        if unlike.any():
            _refuse(manifest, names[int(unlike.argmax())], manifests)
    kinds = [dtype_named(name) for name in dtypes]
    return [
        LogicalTensor(name=name, shape=tuple(fact[len(fact) - fact[_NDIM] :]), dtype=kinds[fact[0]])
        for name, fact in zip(number, known[: len(number)].tolist(), strict=True)
    ]


def _facts(manifest: SourceManifest, dtypes: dict[str, int]) -> Facts:
    columns = manifest.tensors
    facts = np.ones((len(columns.names), 2 + MAX_RANK), np.int64)
    for name in dict.fromkeys(columns.dtypes):
        dtypes.setdefault(name, len(dtypes))
    facts[:, _DTYPE] = list(map(dtypes.__getitem__, columns.dtypes))
    facts[:, _NDIM] = numbers(columns.ndims)
    facts[:, 2 + MAX_RANK - manifest.axes :] = manifest.table(columns.shapes)
    return facts


def _refuse(other: SourceManifest, name: str, manifests: Sequence[SourceManifest]) -> None:
    first = next(manifest for manifest in manifests if name in manifest.tensors.names)
    said = [
        f"{manifest.source} says {manifest.tensor_shape(row)} "
        f"{dtype_named(manifest.tensors.dtypes[row])}"
        for manifest in (first, other)
        for row in [manifest.tensors.names.index(name)]
    ]
    raise PlanError(
        f"{name}: {said[0]}, {said[1]}",
        remedy="every rank must publish the same model, sharded alike",
    )
