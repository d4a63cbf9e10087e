"""The manifest: what one trainer process offers, as plain columns that anyone can check.

It travels over HTTP as msgpack (or JSON when small). Nothing in it is code or pickle: names,
shapes, addresses and strides as numbers, and the transport's opaque metadata with a checksum.

A column of numbers is the bytes of little-endian 64-bit integers (base64 in JSON), one for each
row. A table of them has `axes` to the row, aligned at the right: of a tensor with fewer axes the
first numbers are a shape of 1, a start of 0.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from engine_plugins.errors import AdminRequestError, ManifestError
from engine_plugins.weights.contract.manifest_checks import MAX_RANK, check_manifest

__all__ = [
    "FORMAT",
    "JSON",
    "MAX_JSON_BYTES",
    "MSGPACK",
    "BoxColumns",
    "OfferedBox",
    "RegionColumns",
    "SourceManifest",
    "TensorColumns",
    "decode_manifest",
    "encode_manifest",
    "numbers",
    "packed",
]

FORMAT: Literal[3] = 3
MSGPACK = "application/msgpack"
JSON = "application/json"
MAX_JSON_BYTES = 4 * 1024**2
"""JSON is for small manifests; its length cannot be known before it is built."""

Axes = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)]
Facts = Annotated[dict[str, str | int | bool], msgspec.Meta(max_length=64)]

Address = Annotated[int, msgspec.Meta(ge=1, lt=2**63 - 8)]
GlobalRank = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class TensorColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The logical tensors that the boxes speak of, one row each."""

    names: list[str]
    dtypes: list[str]
    """Names as torch prints them without the module: `float32`, `bfloat16`, `float8_e4m3fn`."""
    ndims: bytes
    """Axes of the tensor itself, at most `axes`."""
    shapes: bytes
    """Table: shape of the whole HF tensor, in elements."""


class RegionColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Registered memory of the offering process, one row per region."""

    addresses: bytes
    nbytes: bytes
    devices: bytes
    """CUDA ordinal, or -1 for host memory."""


class BoxColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Boxes of logical tensors and where they lie, one row each."""

    tensors: bytes
    """Row of the tensor in `TensorColumns`."""
    starts: bytes
    """Table: first index of the box, in elements."""
    shapes: bytes
    """Table: elements of the box on each axis."""
    regions: bytes
    """Row of the region in `RegionColumns`."""
    offsets_bytes: bytes
    """Of the box's first element, from the region's start."""
    strides_bytes: bytes
    """Table: distance between neighbours on each axis of the box; never negative, and one element
    on the last axis (where that axis has more than one index)."""


_TABLES: dict[str, type[msgspec.Struct]] = {
    "tensors": TensorColumns,
    "regions": RegionColumns,
    "boxes": BoxColumns,
}
_NUMBER_BYTES = 8
_TOO_LONG = re.compile(r"length <= \d+ - at `\$\.(\w+)\.(\w+)`")
"""How msgspec says that a column breaks its bound."""


class OfferedBox(NamedTuple):
    """One row of `BoxColumns`."""

    tensor: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    region: int
    offset_bytes: int
    strides_bytes: tuple[int, ...]


class SourceManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One trainer process's offer of weights."""

    format: Literal[3]
    source: str
    """Who speaks, for people: `trainer rank 3 of 8 (host-a, pid 4711)`."""
    transport: Literal["nixl", "in_memory"]
    agent: str
    """The transport agent's name; the peer that an error will name."""
    agent_metadata: bytes
    agent_metadata_sha256: str
    model: Facts
    """Facts of the HF config that both sides can compare; may be empty."""
    version_word: Address
    """Address of 8 registered bytes of host memory: a little-endian number above 0, which the
    source changes before it writes to memory that an engine may still read."""
    axes: Axes
    """Numbers in a row of every table: the most axes that a tensor has, at least 1."""
    tensors: TensorColumns
    regions: RegionColumns
    boxes: BoxColumns
    host: str = ""
    """A word for the machine, to find the nearest source: its kernel's boot id; empty if it is not
    said. An engine takes a source for near whose word is its own."""
    global_rank: GlobalRank | None = None
    """Rank in the trainer's job, where there is one."""
    partial: bool = False
    """Whether the offer leaves parts of the model out, which stay as the engine has them. It counts
    where every source says so."""

    def table(self, column: bytes) -> npt.NDArray[np.int64]:
        """[rows, axes] of a table's bytes; read-only."""
        return numbers(column).reshape(-1, self.axes)

    def tensor_shape(self, row: int) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return tuple(self.table(self.tensors.shapes)[row, self._own_axes(row)].tolist())

    def box(self, row: int) -> OfferedBox:
        """One box, with as many axes as its tensor has: for few of them, and for messages."""
        boxes = self.boxes
        tensor, region, offset = (
            int(numbers(column)[row])
            for column in (boxes.tensors, boxes.regions, boxes.offsets_bytes)
        )
        start, shape, strides = (
            tuple(self.table(column)[row, self._own_axes(tensor)].tolist())
            for column in (boxes.starts, boxes.shapes, boxes.strides_bytes)
        )
        return OfferedBox(tensor, start, shape, region, offset, strides)

    @property
    def box_count(self) -> int:
        """Rows of `boxes`."""
        return len(self.boxes.tensors) // 8

    def _own_axes(self, tensor: int) -> slice:
        return slice(self.axes - int(numbers(self.tensors.ndims)[tensor]), None)


def numbers(column: bytes) -> npt.NDArray[np.int64]:
    """[n] of a column's bytes; read-only."""
    return np.frombuffer(column, dtype="<i8")


def packed(values: Iterable[int]) -> bytes:
    """The bytes of a column, or of a table, row after row."""
    return np.fromiter(values, dtype="<i8").tobytes()


def encode_manifest(manifest: SourceManifest) -> bytes:
    """Encode as msgpack, the form that `decode_manifest` reads."""
    return msgspec.msgpack.encode(manifest)


def decode_manifest(
    body: bytes, *, content_type: str = MSGPACK, max_entries: int
) -> SourceManifest:
    """Read and check a manifest from a peer; nothing in it is trusted.

    Args:
        body: the manifest, uncompressed.
        content_type: `application/msgpack` or `application/json`, parameters ignored.
        max_entries: most rows that each of the three tables may have. A longer column of any of
            them is refused from its header, before it is built.

    Raises:
        AdminRequestError: the body is not a manifest at all (not msgpack or JSON, a missing
            field, a wrong type, another format).
        ManifestError: it is one, and contradicts itself or breaks a bound.
    """
    kind = content_type.partition(";")[0].strip().lower()
    try:
        if kind == MSGPACK:
            manifest = _unbounded(msgspec.msgpack.decode(body, type=_bounded(max_entries)))
        elif kind == JSON:
            _refuse_long_json(body)
            manifest = _unbounded(msgspec.json.decode(body, type=_bounded(max_entries)))
        else:
            raise AdminRequestError(
                f"a manifest cannot be read from content type {content_type[:80]!r}",
                remedy=f"send {MSGPACK}, or {JSON} when it is small",
            )
    # UnicodeDecodeError: bytes in a string that are not UTF-8. RecursionError: nested deeper
    # than msgspec follows.
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        too_long = _over_a_bound(error, max_entries)
        if too_long is not None:
            raise too_long from error
        raise AdminRequestError(
            f"the body of {len(body)} bytes is not a manifest of format {FORMAT}: "
            f"{str(error)[:300]}",
            remedy="send what WeightSource.manifest_bytes of the server's release gives, or follow "
            "the manifest's schema",
        ) from error
    check_manifest(manifest, max_entries=max_entries)
    return manifest


@functools.lru_cache(maxsize=4)
def _bounded(max_entries: int) -> type[msgspec.Struct]:
    """`SourceManifest` with a length for every column, which msgspec reads in the column's header.

    Without it one short header, or a gzip stream of one repeated letter, makes gigabytes of Python
    objects before anything could count them.
    """
    most = {
        list[str]: msgspec.Meta(max_length=max_entries),
        # The widest row of a table; which columns are tables is for check_manifest to say.
        bytes: msgspec.Meta(max_length=_NUMBER_BYTES * MAX_RANK * max_entries),
    }

    def columns(kind: type[msgspec.Struct]) -> type[msgspec.Struct]:
        fields = [
            (each.name, Annotated[each.type, most[each.type]])
            for each in msgspec.structs.fields(kind)
        ]
        return msgspec.defstruct(kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True)

    tables = [(name, columns(kind)) for name, kind in _TABLES.items()]
    return msgspec.defstruct(
        SourceManifest.__name__, tables, bases=(SourceManifest,), frozen=True, kw_only=True
    )


def _unbounded(decoded: msgspec.Struct) -> SourceManifest:
    """The same as the type that everybody else knows; nothing of the columns is copied."""
    fields = msgspec.structs.asdict(decoded)
    for name, kind in _TABLES.items():
        fields[name] = kind(**msgspec.structs.asdict(fields[name]))
    return SourceManifest(**fields)


def _over_a_bound(error: Exception, max_entries: int) -> ManifestError | None:
    """The error of a column that msgspec found too long; None for any other."""
    found = _TOO_LONG.search(str(error))
    if found is None or found[1] not in _TABLES:
        return None
    return ManifestError(
        f"the manifest has more {found[1]} than the limit of {max_entries} (in its column "
        f"{found[2]})",
        remedy="merge boxes, or raise the engine's limit of manifest entries",
    )


def _refuse_long_json(body: bytes) -> None:
    if len(body) > MAX_JSON_BYTES:
        raise ManifestError(
            f"a JSON manifest of {len(body)} bytes is over the limit of {MAX_JSON_BYTES}",
            remedy=f"send it as {MSGPACK}",
        )
