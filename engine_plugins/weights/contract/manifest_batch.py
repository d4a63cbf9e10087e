"""Manifests of many processes in one body, for the one process that speaks with engines.

A body is a msgpack array of bytes. Each element is a manifest as msgpack, or the gzip stream of
one: no manifest begins like gzip.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import msgspec

from engine_plugins.errors import AdminRequestError, EnginePluginError
from engine_plugins.weights.contract.manifest import MSGPACK

__all__ = [
    "MAX_BATCH",
    "decode_batch",
    "encode_batch",
    "is_gzip",
    "naming",
    "pack_manifest",
    "refuse_other_than_msgpack",
]

MAX_BATCH = 4096
"""Most manifests in one body."""
GZIP_ABOVE_BYTES = 64 * 1024
_GZIP_MAGIC = b"\x1f\x8b"


def pack_manifest(manifest: bytes) -> bytes:
    """One element of a batch: gzip, where that is worth it.

    Args:
        manifest: as msgpack.
    """
    return manifest if len(manifest) <= GZIP_ABOVE_BYTES else gzip.compress(manifest, 1)


def encode_batch(packed: Sequence[bytes | bytearray | memoryview]) -> bytes:
    """The body of some elements."""
    return msgspec.msgpack.encode(packed)


def decode_batch(body: bytes) -> list[bytes]:
    """The elements of a body; they are not looked into.

    Raises:
        AdminRequestError: the body is no such array, or has none, or more than `MAX_BATCH`.
    """
    try:
        return _decoder().decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AdminRequestError(
            f"the body of {len(body)} bytes is not an array of 1 to {MAX_BATCH} manifests: "
            f"{str(error)[:300]}",
            remedy="send a msgpack array of bytes: each a manifest as msgpack, or its gzip stream",
        ) from error


def refuse_other_than_msgpack(content_type: str) -> None:
    """Take a body for what its content type says; parameters are ignored.

    Raises:
        AdminRequestError: it says something else, or nothing.
    """
    if content_type.partition(";")[0].strip().lower() != MSGPACK:
        raise AdminRequestError(
            f"manifests cannot be read from content type {content_type[:80]!r}",
            remedy=f"send them as {MSGPACK}",
        )


@contextmanager
def naming(which: str) -> Iterator[None]:
    """Say in an error of ours of which element it is."""
    try:
        yield
    except EnginePluginError as error:
        error.message = f"{which}: {error.message}"
        raise


def is_gzip(element: bytes) -> bool:
    """Whether an element is packed."""
    return element.startswith(_GZIP_MAGIC)


@functools.cache
def _decoder() -> msgspec.msgpack.Decoder[list[bytes]]:
    elements = Annotated[list[bytes], msgspec.Meta(min_length=1, max_length=MAX_BATCH)]
    return msgspec.msgpack.Decoder(elements)
