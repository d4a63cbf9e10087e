"""What must hold before a manifest from a peer may be used: bounds, and no contradictions.

The columns are checked as arrays, so that a hundred thousand boxes cost milliseconds. Sums and
products are arranged so that no 64-bit number can overflow on the way to a verdict.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from engine_plugins.errors import ManifestError
from engine_plugins.weights.boxes.dtypes import dtype_named

if TYPE_CHECKING:
    from engine_plugins.weights.contract.manifest import (
        RegionColumns,
        SourceManifest,
        TensorColumns,
    )

__all__ = ["MAX_RANK", "check_manifest"]

MAX_RANK = 8
"""Axes that a tensor may have."""

Ints = npt.NDArray[np.int64]

_NUMBER_BYTES = 8
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
    shapes, itemsizes = _check_tensors(manifest)
    sizes = _check_regions(manifest.regions)
    _check_boxes(manifest, shapes, itemsizes, sizes)


def _refuse(message: str, remedy: str = "send the manifest as the trainer built it") -> NoReturn:
    raise ManifestError(message, remedy=remedy)


def _check_lengths(manifest: SourceManifest, max_entries: int) -> None:
    tensors, regions, boxes = manifest.tensors, manifest.regions, manifest.boxes
    strings = {"names": len(tensors.names), "dtypes": len(tensors.dtypes)}
    row = _NUMBER_BYTES
    table = _NUMBER_BYTES * manifest.axes
    for what, lengths in (
        ("tensors", strings | _lengths("tensors", tensors, ndims=row, shapes=table)),
        ("regions", _lengths("regions", regions, addresses=row, nbytes=row, devices=row)),
        (
            "boxes",
            _lengths("boxes", boxes, tensors=row, regions=row, offsets_bytes=row)
            | _lengths("boxes", boxes, starts=table, shapes=table, strides_bytes=table),
        ),
    ):
        if len(set(lengths.values())) > 1:
            _refuse(f"the columns of {what} differ in length: {lengths}")
        rows = next(iter(lengths.values()))
        if rows > max_entries:
            _refuse(
                f"the manifest has {rows} {what}, more than the limit of {max_entries}",
                "merge boxes, or raise the engine's limit of manifest entries",
            )
    if not manifest.tensors.names:
        _refuse("the manifest offers no tensor", "offer at least one tensor, or do not send it")


def _lengths(what: str, columns: object, **row_bytes: int) -> dict[str, int]:
    """Rows of columns of numbers, by name; each has whole rows of so many bytes."""
    lengths: dict[str, int] = {}
    for name, size in row_bytes.items():
        lengths[name], rest = divmod(len(getattr(columns, name)), size)
        if rest:
            _refuse(
                f"{what}.{name} has {len(getattr(columns, name))} bytes, which are no rows of "
                f"{size // _NUMBER_BYTES} numbers"
            )
    return lengths


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


class _Checked(NamedTuple):
    """Tensors that were found sound, and what was found out about them."""

    tensors: TensorColumns
    axes: int
    shapes: Ints
    itemsizes: Ints


_last_checked: list[_Checked] = []
"""At most one: the ranks of a job come one after another, and most name the same tensors."""


def _check_tensors(manifest: SourceManifest) -> tuple[Ints, Ints]:
    """Return the shapes, [tensors, axes], and the bytes per element."""
    for last in _last_checked[:1]:
        if last.axes == manifest.axes and last.tensors == manifest.tensors:
            return last.shapes, last.itemsizes
    shapes, itemsizes = _check_new_tensors(manifest)
    _last_checked[:] = [_Checked(manifest.tensors, manifest.axes, shapes, itemsizes)]
    return shapes, itemsizes


def _check_new_tensors(manifest: SourceManifest) -> tuple[Ints, Ints]:
    tensors = manifest.tensors
    _check_names(tensors.names)
    sizes = {name: dtype_named(name).itemsize for name in set(tensors.dtypes)}
    itemsizes = np.array([sizes[name] for name in tensors.dtypes], dtype=np.int64)
    ndims = _column("tensors.ndims", tensors.ndims)
    row = _first(ndims > manifest.axes)
    if row is not None:
        _refuse(f"tensors.ndims[{row}] is {ndims[row]}, the tables have {manifest.axes} axes")
    shapes = _table("tensors.shapes", tensors.shapes, manifest.axes)
    foreign = np.arange(manifest.axes) < manifest.axes - ndims[:, None]
    row = _first((foreign & (shapes != 1)).any(axis=1))
    if row is not None:
        _refuse(
            f"the tensor {tensors.names[row]} has {ndims[row]} axes and the row "
            f"{shapes[row].tolist()}: the numbers before its own must be 1"
        )
    # In floating point, where a product cannot wrap; the limit leaves room for its rounding.
    nbytes = shapes.astype(np.float64).prod(axis=1) * itemsizes
    row = _first(nbytes >= _MAX_TENSOR_BYTES)
    if row is not None:
        _refuse(
            f"the tensor {tensors.names[row]} of shape {manifest.tensor_shape(row)} is too large"
        )
    return shapes, itemsizes


def _check_names(names: Sequence[str]) -> None:
    if max(map(len, names)) > _MAX_NAME or not all(names) or not all(map(str.isprintable, names)):
        for name in names:
            _check_text("tensor name", name)
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        _refuse(f"the tensor {twice} is listed twice", "list each tensor in one row")


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
    starts = _table("boxes.starts", boxes.starts, manifest.axes)
    extents = _table("boxes.shapes", boxes.shapes, manifest.axes)
    strides = _table("boxes.strides_bytes", boxes.strides_bytes, manifest.axes)
    wholes = shapes[tensors]
    row = _first((extents == 0).any(axis=1))
    if row is not None:
        _refuse(f"{_name(manifest, row)} is empty", "leave boxes without elements out")
    row = _first(((extents > wholes) | (starts > wholes - extents)).any(axis=1))
    if row is not None:
        box = manifest.box(row)
        _refuse(
            f"{_name(manifest, row)} at {box.start} of shape {box.shape} lies outside its tensor "
            f"of shape {manifest.tensor_shape(box.tensor)}"
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
    for axis in range(manifest.axes):
        steps = extents[:, axis] - 1
        outside |= (steps > 0) & (strides[:, axis] > left // np.maximum(steps, 1))
        left = left - np.where(outside, 0, steps * np.where(outside, 0, strides[:, axis]))
    row = _first(outside)
    if row is not None:
        box = manifest.box(row)
        _refuse(
            f"{_name(manifest, row)} of shape {box.shape} with strides {box.strides_bytes} at "
            f"offset {box.offset_bytes} reaches outside its region of {region_bytes[row]} bytes: "
            "it claims memory that is not registered"
        )
    row = _first((strides[:, -1] != itemsizes) & (extents[:, -1] > 1))
    if row is not None:
        _refuse(
            f"{_name(manifest, row)} steps {strides[row, -1]} bytes on its last axis, its elements "
            f"have {itemsizes[row]}",
            "offer a copy whose last axis is contiguous",
        )


def _name(manifest: SourceManifest, box: int) -> str:
    tensor = int(np.frombuffer(manifest.boxes.tensors, dtype="<i8")[box])
    return f"box {box} ({manifest.tensors.names[tensor]})"


def _first(wrong: npt.NDArray[np.bool_] | np.bool_) -> int | None:
    """Row of the first true entry, if there is one."""
    return int(wrong.argmax()) if wrong.any() else None


def _rows(what: str, values: bytes, count: int, table: str) -> Ints:
    column = _column(what, values)
    row = _first(column >= count)
    if row is not None:
        _refuse(f"{what}[{row}] is {column[row]}, there are {count} {table}")
    return column


def _column(what: str, values: bytes, *, lowest: int = 0) -> Ints:
    """A column's numbers, none of them below `lowest`."""
    column: Ints = np.frombuffer(values, dtype="<i8")
    low = _first(column < lowest)
    if low is not None:
        _refuse(f"{what}[{low}] is {column[low]}, outside {lowest} .. 2**63-1")
    return column


def _table(what: str, values: bytes, axes: int) -> Ints:
    """[rows, axes] of a table's numbers, none of them negative."""
    return _column(f"{what} (row after row)", values).reshape(-1, axes)
