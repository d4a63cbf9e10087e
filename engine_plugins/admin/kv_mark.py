"""The mark that keeps KV of other weights from being found.

Engines hash or key their prefix cache by what a request brings along (vLLM's `cache_salt`,
SGLang's `extra_key`); the mark of the weights goes in front of the request's own. In front,
because SGLang hangs the name of a LoRA adapter on at the end.
"""

from __future__ import annotations

__all__ = ["marked"]

_BEGIN, _END = "\x00engine-plugins:", "\x00"


def marked(key: str | None, generation: str | None) -> str | None:
    """A request's cache key under a generation of weights, whatever mark it had before.

    Before the first update there is no generation, and the key is the request's own; a mark in it
    is a client's then, for KV that later requests would find under new weights.
    """
    own = key or ""
    while own.startswith(_BEGIN):  # a client's may hold another
        own = own.removeprefix(_BEGIN).partition(_END)[2]
    if generation is None:
        return own or None
    return f"{_BEGIN}{generation}{_END}{own}"
