"""The mark that keeps KV of other weights from being found.

Engines hash or key their prefix cache by what a request brings along (vLLM's `cache_salt`,
SGLang's `extra_key`); the mark of the weights goes in behind the request's own.
"""

from __future__ import annotations

__all__ = ["marked"]

_MARK = "\x00engine-plugins:"


def marked(key: str | None, generation: str | None) -> str | None:
    """A request's cache key under a generation of weights, whatever mark it had before.

    Before the first update there is no generation, and the key is the request's own.
    """
    own = (key or "").partition(_MARK)[0]
    return f"{own}{_MARK}{generation}" if generation is not None else key
