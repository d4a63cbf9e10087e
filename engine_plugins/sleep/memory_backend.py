"""The seam to what can give an engine rank's memory back: a memory saver, or plain pages."""

from __future__ import annotations

from typing import Literal, Protocol

__all__ = ["MEMORY_TAGS", "MemoryBackend", "MemoryTag"]

MemoryTag = Literal["weights", "kv_cache", "cuda_graph"]
MEMORY_TAGS: tuple[MemoryTag, ...] = ("weights", "kv_cache", "cuda_graph")
"""In the order in which memory is mapped again."""


class MemoryBackend(Protocol):
    """Memory of one engine rank that can be released and mapped again, tag by tag.

    It is always called through a `MemoryLedger`, which refuses what the backend would not survive.
    """

    @property
    def tags(self) -> frozenset[MemoryTag]:
        """What can be released here."""
        ...

    @property
    def together(self) -> bool:
        """Whether all of them can only be released at once (they may be restored one by one)."""
        ...

    def release(self, tag: MemoryTag, *, keep: bool) -> None:
        """Give the memory back to the device; `keep` has its contents return with it."""
        ...

    def restore(self, tag: MemoryTag) -> None:
        """Map the memory again at the same addresses; without `keep` it holds nothing of use."""
        ...

    def unreleased(self, tag: MemoryTag) -> dict[str, int]:
        """Bytes that stay resident when the tag is released, by the reason why."""
        ...
