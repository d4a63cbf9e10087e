"""What must hold before a manifest from a peer may be used: bounds, and no contradictions.

The columns are checked as arrays, so that a hundred thousand boxes cost milliseconds. Sums and
products are arranged so that no 64-bit number can overflow on the way to a verdict.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt

from engine_plugins.errors import ManifestError
from engine_plugins.weights.dtypes import dtype_named

if TYPE_CHECKING:
    from engine_plugins.weights.manifest import RegionColumns, SourceManifest, TensorColumns

__all__ = ["MAX_RANK", "check_manifest"]

MAX_RANK = 8
"""Axes that a tensor may have."""

Ints = npt.NDArray[np.int64]

_LIMIT = 2**63
_MAX_TENSOR_BYTES = 2**62
_MAX_NAME = 1024
_MAX_DEVICE = 1023


def check_manifest(manifest: SourceManifest, *, max_entries: int) -> None:
    """Check a decoded manifest.

    Raises:
        ManifestError: it contradicts itself or breaks a bound; the text names the table, the
            row and the numbers.
    """
    _check_lengths(manifest, max_entries)
    _check_agent(manifest)
    shapes, itemsizes = _check_tensors(manifest.tensors)
    sizes = _check_regions(manifest.regions)
    _check_boxes(manifest, shapes, itemsizes, sizes)


def _refuse(message: str, remedy: str = "send the manifest as the trainer built it") -> NoReturn:
    raise ManifestError(message, remedy=remedy)


def _check_lengths(manifest: SourceManifest, max_entries: int) -> None:
    for table in ("tensors", "regions", "boxes"):
        columns = msgspec.structs.asdict(getattr(manifest, table))
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            _refuse(f"the columns of {table} differ in length: {lengths}")
        rows = next(iter(lengths.values()))
        if rows > max_entries:
            _refuse(
                f"the manifest has {rows} {table}, more than the limit of {max_entries}",
                "merge boxes, or raise the engine's limit of manifest entries",
            )
    if not manifest.tensors.names:
        _refuse("the manifest offers no tensor", "offer at least one tensor, or do not send it")


def _check_agent(manifest: SourceManifest) -> None:
    _check_text("agent", manifest.agent)
    _check_text("source", manifest.source)
    if manifest.host:
        _check_text("host", manifest.host)
    digest = hashlib.sha256(manifest.agent_metadata).hexdigest()
    if digest != manifest.agent_metadata_sha256:
        _refuse(
            f"the metadata of agent {manifest.agent!r} ({len(manifest.agent_metadata)} bytes) has "
            f"sha256 {digest[:16]}..., not {manifest.agent_metadata_sha256[:16]!r}...: it was "
            "truncated or altered on the way"
        )


def _check_text(what: str, text: str) -> None:
    if not text or len(text) > _MAX_NAME or not text.isprintable():
        _refuse(
            f"the {what} {text[:80]!r} ({len(text)} characters) is empty, longer than "
            f"{_MAX_NAME}, or not printable"
        )


def _check_tensors(tensors: TensorColumns) -> tuple[Ints, Ints]:
    """Return the shapes as `_table` gives them, and the bytes per element."""
    seen: set[str] = set()
    for name in tensors.names:
        _check_text("tensor name", name)
        if name in seen:
            _refuse(f"the tensor {name} is listed twice", "list each tensor in one row")
        seen.add(name)
    sizes = {name: dtype_named(name).itemsize for name in set(tensors.dtypes)}
    itemsizes = np.array([sizes[name] for name in tensors.dtypes], dtype=np.int64)
    shapes = _table("tensors.shapes", tensors.shapes, fill=1)
    # In floating point, where a product cannot wrap; the limit leaves room for its rounding.
    nbytes = shapes[:, 1:].astype(np.float64).prod(axis=1) * itemsizes
    row = _first(nbytes >= _MAX_TENSOR_BYTES)
    if row is not None:
        _refuse(f"the tensor {tensors.names[row]} of shape {tensors.shapes[row]} is too large")
    return shapes, itemsizes


def _check_regions(regions: RegionColumns) -> Ints:
    """Return the regions' sizes in bytes."""
    addresses = _column("regions.addresses", regions.addresses)
    nbytes = _column("regions.nbytes", regions.nbytes)
    devices = _column("regions.devices", regions.devices, lowest=-1)
    row = _first(devices > _MAX_DEVICE)
    if row is not None:
        _refuse(f"region {row} is on device {devices[row]}; the highest is {_MAX_DEVICE}")
    row = _first((nbytes == 0) | (addresses == 0))
    if row is not None:
        _refuse(f"region {row} has {nbytes[row]} bytes at address {addresses[row]}")
    row = _first(nbytes > np.iinfo(np.int64).max - addresses)
    if row is not None:
        _refuse(f"region {row} of {nbytes[row]} bytes at {addresses[row]} wraps around")
    order = np.lexsort((addresses, devices))
    low, high = order[:-1], order[1:]
    touching = (devices[low] == devices[high]) & (addresses[low] + nbytes[low] > addresses[high])
    pair = _first(touching)
    if pair is not None:
        _refuse(f"the regions {low[pair]} and {high[pair]} overlap", "register each byte once")
    return nbytes


def _check_boxes(
    manifest: SourceManifest, shapes: Ints, itemsizes: Ints, region_bytes: Ints
) -> None:
    boxes = manifest.boxes
    tensors = _rows("boxes.tensors", boxes.tensors, len(itemsizes), "tensors")
    regions = _rows("boxes.regions", boxes.regions, len(region_bytes), "regions")
    starts = _table("boxes.starts", boxes.starts, fill=0)
    extents = _table("boxes.shapes", boxes.shapes, fill=1)
    strides = _table("boxes.strides_bytes", boxes.strides_bytes, fill=0)
    wholes = shapes[tensors]
    for what, table in (("start", starts), ("shape", extents), ("stride", strides)):
        row = _first(table[:, 0] != wholes[:, 0])
        if row is not None:
            _refuse(
                f"{_name(manifest, row)} has {table[row, 0]} axes in its {what}, its tensor has "
                f"{wholes[row, 0]}"
            )
    starts, extents, strides, wholes = (t[:, 1:] for t in (starts, extents, strides, wholes))
    row = _first((extents == 0).any(axis=1))
    if row is not None:
        _refuse(f"{_name(manifest, row)} is empty", "leave boxes without elements out")
    row = _first(((extents > wholes) | (starts > wholes - extents)).any(axis=1))
    if row is not None:
        _refuse(
            f"{_name(manifest, row)} at {boxes.starts[row]} of shape {boxes.shapes[row]} lies "
            f"outside its tensor of shape {manifest.tensors.shapes[boxes.tensors[row]]}"
        )
    offsets = _column("boxes.offsets_bytes", boxes.offsets_bytes)
    _check_reach(manifest, itemsizes[tensors], region_bytes[regions], offsets, extents, strides)


def _check_reach(
    manifest: SourceManifest,
    itemsizes: Ints,
    region_bytes: Ints,
    offsets: Ints,
    extents: Ints,
    strides: Ints,
) -> None:
    """Check that no box's memory leaves its region, and that its last axis is contiguous."""
    left = region_bytes - itemsizes
    outside = offsets > left
    left = np.where(outside, 0, left - offsets)
    for axis in range(MAX_RANK):
        steps = extents[:, axis] - 1
        outside |= (steps > 0) & (strides[:, axis] > left // np.maximum(steps, 1))
        left = left - np.where(outside, 0, steps * np.where(outside, 0, strides[:, axis]))
    row = _first(outside)
    if row is not None:
        boxes = manifest.boxes
        _refuse(
            f"{_name(manifest, row)} of shape {boxes.shapes[row]} with strides "
            f"{boxes.strides_bytes[row]} at offset {boxes.offsets_bytes[row]} reaches outside its "
            f"region of {region_bytes[row]} bytes: it claims memory that is not registered"
        )
    axes = np.fromiter(map(len, manifest.boxes.shapes), dtype=np.int64, count=len(extents))
    last = np.maximum(axes - 1, 0)[:, None]
    apart = np.take_along_axis(strides, last, axis=1)[:, 0] != itemsizes
    row = _first(apart & (np.take_along_axis(extents, last, axis=1)[:, 0] > 1))
    if row is not None:
        _refuse(
            f"{_name(manifest, row)} steps {manifest.boxes.strides_bytes[row][-1]} bytes on its "
            f"last axis, its elements have {itemsizes[row]}",
            "offer a copy whose last axis is contiguous",
        )


def _name(manifest: SourceManifest, box: int) -> str:
    return f"box {box} ({manifest.tensors.names[manifest.boxes.tensors[box]]})"


def _first(wrong: npt.NDArray[np.bool_] | np.bool_) -> int | None:
    """Row of the first true entry, if there is one."""
    return int(wrong.argmax()) if wrong.any() else None


def _rows(what: str, values: Sequence[int], count: int, table: str) -> Ints:
    column = _column(what, values)
    row = _first(column >= count)
    if row is not None:
        _refuse(f"{what}[{row}] is {column[row]}, there are {count} {table}")
    return column


def _column(what: str, values: Sequence[int], *, lowest: int = 0) -> Ints:
    """Turn a column into int64, refusing what is below `lowest` or not below 2**63."""
    try:
        column = np.fromiter(values, dtype=np.int64, count=len(values))
    except OverflowError:
        row = next(n for n, value in enumerate(values) if not -_LIMIT <= value < _LIMIT)
        _refuse(f"{what}[{row}] is {values[row]}, outside {lowest} .. 2**63-1")
    low = _first(column < lowest)
    if low is not None:
        _refuse(f"{what}[{low}] is {values[low]}, outside {lowest} .. 2**63-1")
    return column


def _table(what: str, rows: Sequence[Sequence[int]], *, fill: int) -> Ints:
    """Turn ragged rows into [rows, 1 + MAX_RANK]: the axis count, the values, then `fill`."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    row = _first(lengths > MAX_RANK)
    if row is not None:
        _refuse(f"{what}[{row}] has {lengths[row]} axes, the most is {MAX_RANK}")
    flat = _column(f"{what} (flattened)", list(chain.from_iterable(rows)))
    table = np.full((len(rows), 1 + MAX_RANK), fill, dtype=np.int64)
    table[:, 0] = lengths
    table[:, 1:][np.arange(MAX_RANK) < lengths[:, None]] = flat
    return table
