"""The manifest: what one trainer process offers, as plain columns that anyone can check.

It travels over HTTP as msgpack (or JSON when small). Nothing in it is code or pickle: names,
shapes, addresses and strides as numbers, and the transport's opaque metadata with a checksum.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["FORMAT", "BoxColumns", "RegionColumns", "SourceManifest", "TensorColumns"]

FORMAT = 1


class TensorColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The logical tensors that the boxes speak of, one row each."""

    names: list[str]
    dtypes: list[str]
    """Names as torch prints them without the module: `float32`, `bfloat16`, `float8_e4m3fn`."""
    shapes: list[list[int]]
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
    starts: list[list[int]]
    shapes: list[list[int]]
    regions: list[int]
    """Row of the region in `RegionColumns`."""
    offsets_bytes: list[int]
    """Of the box's first element, from the region's start."""
    strides_bytes: list[list[int]]
    """Distance between neighbours on each axis of the box; never negative."""


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
    model: dict[str, str | int | bool]
    """Facts of the HF config that both sides can compare; may be empty."""
    tensors: TensorColumns
    regions: RegionColumns
    boxes: BoxColumns
