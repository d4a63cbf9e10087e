"""A memory backend without memory."""

from __future__ import annotations

from engine_plugins.sleep.memory_backend import MEMORY_TAGS, MemoryTag

__all__ = ["InMemoryRegions"]


class InMemoryRegions:
    """A memory backend that only notes what it is told, and fails when a test says so."""

    together = False
    tags: frozenset[MemoryTag] = frozenset(MEMORY_TAGS)

    def __init__(self) -> None:
        self.released: dict[MemoryTag, bool] = {}
        self.failures: dict[tuple[str, MemoryTag], Exception] = {}

    def release(self, tag: MemoryTag, *, keep: bool) -> None:
        self._maybe_fail("release", tag)
        self.released[tag] = keep

    def restore(self, tag: MemoryTag) -> None:
        self._maybe_fail("restore", tag)
        del self.released[tag]

    def unreleased(self, tag: MemoryTag) -> dict[str, int]:
        return {}

    def _maybe_fail(self, call: str, tag: MemoryTag) -> None:
        error = self.failures.pop((call, tag), None)
        if error is not None:
            raise error
