"""The mark that keeps KV of other weights from being found.

Engines hash or key their prefix cache by what a request brings along (vLLM's `cache_salt`,
SGLang's `extra_key`); the mark of the weights goes in front of the request's own. In front,
because SGLang hangs the name of a LoRA adapter on at the end.
"""

from __future__ import annotations

__all__ = ["marked"]

_BEGIN, _END = "\x00engine-plugins:", "\x00"


def marked(key: str | None, mark: str | None) -> str | None:
    """A request's cache key under the mark of the weights, whatever mark it had before.

    Args:
        key: the request's own. A mark in it may be a client's, for KV that later requests would
            find under new weights.
        mark: `EngineState.kv_mark`; without one the key is the request's own.
    """
    own = key or ""
    while own.startswith(_BEGIN):  # a client's may hold another
        own = own.removeprefix(_BEGIN).partition(_END)[2]
    if mark is None:
        return own or None
    return f"{_BEGIN}{mark}{_END}{own}"
