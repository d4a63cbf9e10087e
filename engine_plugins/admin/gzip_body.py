"""Bodies that were sent as gzip, unpacked within bounds."""

from __future__ import annotations

import zlib

from engine_plugins.errors import AdminRequestError, BodyTooLargeError

__all__ = ["unpacked"]

MAX_RATIO = 100
"""Bytes of a manifest for each byte of its gzip stream: the most regular ones come to 40."""
FREE_BYTES = 4 << 20
"""Of any body, however short it was packed."""
_WHOLE_GZIP = "send one whole gzip stream, or the manifest plain without Content-Encoding"
_GZIP = 31
"""How zlib calls the format."""


def unpacked(body: bytes, limit_bytes: int) -> bytes:
    """The plain body.

    A stream of one repeated letter unpacks to a thousand times its size, so the sender's own bytes
    bound what it may cost: who has more to say can send it plain.

    Raises:
        BodyTooLargeError: it is longer than `limit_bytes`, or than any manifest would be that packs
            into so few bytes.
        AdminRequestError: it is no gzip stream, or not a whole one.
    """
    bound = min(limit_bytes, max(FREE_BYTES, MAX_RATIO * len(body)))
    unpacker = zlib.decompressobj(wbits=_GZIP)
    try:
        plain = unpacker.decompress(body, bound + 1)
    except zlib.error as error:
        raise AdminRequestError(
            f"the body says gzip and is not: {error}", remedy=_WHOLE_GZIP
        ) from error
    if len(plain) > bound:
        raise BodyTooLargeError(
            f"the manifest of {len(body)} bytes unpacks to more than {bound}",
            remedy="raise ENGINE_PLUGINS_MAX_MANIFEST_BYTES"
            if bound == limit_bytes
            else "send it plain, without Content-Encoding",
        )
    if not unpacker.eof:
        raise AdminRequestError("the gzip body ends before its end mark", remedy=_WHOLE_GZIP)
    return plain
