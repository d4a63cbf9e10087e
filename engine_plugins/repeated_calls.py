"""Calls that are sent a second time when the connection breaks before their answer."""

from __future__ import annotations

from collections.abc import Callable

import httpx

__all__ = ["answered"]

_REPEATABLE = frozenset({"/pause", "/resume", "/sleep", "/wake"})
"""The same call again finds what it was to bring, whatever became of the first one's answer."""


def answered(send: Callable[[], httpx.Response], path: str) -> httpx.Response:
    """Send a call of the admin contract, and once more where that is harmless and may help."""
    try:
        return send()
    except (httpx.ReadError, httpx.RemoteProtocolError):
        if path not in _REPEATABLE:
            raise
    return send()
