"""The manifest: what one trainer process offers, as plain columns that anyone can check.

It travels over HTTP as msgpack (or JSON when small). Nothing in it is code or pickle: names,
shapes, addresses and strides as numbers, and the transport's opaque metadata with a checksum.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from engine_plugins.errors import AdminRequestError, ManifestError
from engine_plugins.weights.manifest_checks import MAX_RANK, check_manifest

__all__ = [
    "FORMAT",
    "JSON",
    "MAX_JSON_BYTES",
    "MSGPACK",
    "BoxColumns",
    "RegionColumns",
    "SourceManifest",
    "TensorColumns",
    "decode_manifest",
    "encode_manifest",
]

FORMAT: Literal[1] = 1
MSGPACK = "application/msgpack"
JSON = "application/json"
MAX_JSON_BYTES = 4 * 1024**2
"""JSON is for small manifests; its length cannot be known before it is built."""

Index = Annotated[list[int], msgspec.Meta(max_length=MAX_RANK)]
Facts = Annotated[dict[str, str | int | bool], msgspec.Meta(max_length=64)]

GlobalRank = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class TensorColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The logical tensors that the boxes speak of, one row each."""

    names: list[str]
    dtypes: list[str]
    """Names as torch prints them without the module: `float32`, `bfloat16`, `float8_e4m3fn`."""
    shapes: list[Index]
    """Shape of the whole HF tensor, in elements."""


class RegionColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Registered memory of the offering process, one row per region."""

    addresses: list[int]
    nbytes: list[int]
    devices: list[int]
    """CUDA ordinal, or -1 for host memory."""


class BoxColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Boxes of logical tensors and where they lie, one row each."""

    tensors: list[int]
    """Row of the tensor in `TensorColumns`."""
    starts: list[Index]
    shapes: list[Index]
    regions: list[int]
    """Row of the region in `RegionColumns`."""
    offsets_bytes: list[int]
    """Of the box's first element, from the region's start."""
    strides_bytes: list[Index]
    """Distance between neighbours on each axis of the box; never negative, and one element on the
    last axis (where that axis has more than one index)."""


class SourceManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One trainer process's offer of weights."""

    format: Literal[1]
    source: str
    """Who speaks, for people: `trainer rank 3 of 8 (host-a, pid 4711)`."""
    transport: Literal["nixl", "in_memory"]
    agent: str
    """The transport agent's name; the peer that an error will name."""
    agent_metadata: bytes
    agent_metadata_sha256: str
    model: Facts
    """Facts of the HF config that both sides can compare; may be empty."""
    tensors: TensorColumns
    regions: RegionColumns
    boxes: BoxColumns
    host: str = ""
    """Name of the machine, to find the nearest source; empty if it is not said."""
    global_rank: GlobalRank | None = None
    """Rank in the trainer's job, where there is one."""


class _Columns(msgspec.Struct, frozen=True):
    """A table whose columns are still bytes, to be counted before anything is built."""

    names: msgspec.Raw = msgspec.Raw()
    addresses: msgspec.Raw = msgspec.Raw()
    tensors: msgspec.Raw = msgspec.Raw()


class _Envelope(msgspec.Struct, frozen=True):
    """The manifest down to its tables and no further."""

    tensors: _Columns
    regions: _Columns
    boxes: _Columns


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
        max_entries: most rows that each of the three tables may have. More are refused from
            the header of the column, before it is built.

    Raises:
        AdminRequestError: the body is not a manifest at all (not msgpack or JSON, a missing
            field, a wrong type, another format).
        ManifestError: it is one, and contradicts itself or breaks a bound.
    """
    kind = content_type.partition(";")[0].strip().lower()
    try:
        if kind == MSGPACK:
            _refuse_long_columns(body, max_entries)
            manifest = msgspec.msgpack.decode(body, type=SourceManifest)
        elif kind == JSON:
            _refuse_long_json(body)
            manifest = msgspec.json.decode(body, type=SourceManifest)
        else:
            raise AdminRequestError(
                f"a manifest cannot be read from content type {content_type[:80]!r}",
                remedy=f"send {MSGPACK}, or {JSON} when it is small",
            )
    # UnicodeDecodeError: bytes in a string that are not UTF-8. RecursionError: nested deeper
    # than msgspec follows.
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AdminRequestError(
            f"the body of {len(body)} bytes is not a manifest of format {FORMAT}: {error}",
            remedy="send what WeightSource.manifest_bytes gives, or follow the manifest's schema",
        ) from error
    check_manifest(manifest, max_entries=max_entries)
    return manifest


def _refuse_long_columns(body: bytes, max_entries: int) -> None:
    envelope = msgspec.msgpack.decode(body, type=_Envelope)
    for what, column in (
        ("tensors", envelope.tensors.names),
        ("regions", envelope.regions.addresses),
        ("boxes", envelope.boxes.tensors),
    ):
        length = _array_length(bytes(memoryview(column)[:5]))
        if length > max_entries:
            raise ManifestError(
                f"the manifest has {length} {what}, more than the limit of {max_entries}",
                remedy="merge boxes, or raise the engine's limit of manifest entries",
            )


def _refuse_long_json(body: bytes) -> None:
    if len(body) > MAX_JSON_BYTES:
        raise ManifestError(
            f"a JSON manifest of {len(body)} bytes is over the limit of {MAX_JSON_BYTES}",
            remedy=f"send it as {MSGPACK}",
        )


def _array_length(head: bytes) -> int:
    """Length of a msgpack array from its first five bytes; 0 when it is none."""
    if not head:
        return 0
    if head[0] & 0xF0 == 0x90:
        return head[0] & 0x0F
    if head[0] == 0xDC:
        return int.from_bytes(head[1:3], "big")
    if head[0] == 0xDD:
        return int.from_bytes(head[1:5], "big")
    return 0
