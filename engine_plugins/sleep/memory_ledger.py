"""What is mapped and what is released, kept on our side.

A memory saver ends the whole process on a wrong state, and reports nothing. So every call to one
goes through a ledger that refuses first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from engine_plugins.errors import ConflictError, SleepRefusedError, UnsupportedError
from engine_plugins.sleep.memory_backend import MEMORY_TAGS, MemoryBackend, MemoryTag

__all__ = ["MemoryLedger"]


class MemoryLedger:
    """Releases and restores the memory of one engine rank, each tag once.

    Args:
        backend: what gives the memory back.
    """

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend
        self._released: set[MemoryTag] = set()
        self._broken: dict[MemoryTag, str] = {}
        """Tags of which a call failed half way: nothing more is known of them."""

    @property
    def tags(self) -> tuple[MemoryTag, ...]:
        """What can be released here, in the order in which it is mapped again."""
        return tuple(tag for tag in MEMORY_TAGS if tag in self._backend.tags)

    @property
    def released(self) -> tuple[MemoryTag, ...]:
        """What is released now."""
        return tuple(tag for tag in MEMORY_TAGS if tag in self._released)

    @property
    def broken(self) -> tuple[MemoryTag, ...]:
        """Tags of which nobody knows whether they are mapped, nor what they hold."""
        return tuple(self._broken)

    def mapped(self, tags: Sequence[MemoryTag]) -> list[MemoryTag]:
        """Those of the tags that are still mapped.

        Raises:
            ConflictError: a call on a tag failed before, or it goes with one that is released.
            UnsupportedError: a tag that this engine cannot release, or not alone.
        """
        for tag in tags:
            if tag not in self._backend.tags:
                raise UnsupportedError(
                    f"this engine cannot release {tag!r}; it can: {', '.join(self.tags) or 'none'}",
                    remedy="leave it out of the tags, or leave the tags out",
                )
            self._require_known(tag)
        left = [tag for tag in tags if tag not in self._released]
        if left and self._backend.together and {*left} != {*self.tags}:
            together = f"this engine releases {' and '.join(self.tags)} only together"
            if self._released:
                raise ConflictError(
                    f"{together}, and {', '.join(self.released)} is released already",
                    remedy="POST /admin/v1/wake, then sleep without tags",
                )
            raise UnsupportedError(together, remedy="leave the tags out")
        return left

    def require_mapped(self, tags: Sequence[MemoryTag]) -> None:
        """Refuse what `release` would refuse, and change nothing."""
        mapped = self.mapped(tags)
        for tag in tags:
            if tag not in mapped:
                raise ConflictError(f"{tag} is released already", remedy="POST /admin/v1/wake")

    def require_released(self, tags: Sequence[MemoryTag]) -> None:
        """Refuse what `restore` would refuse, and change nothing."""
        for tag in tags:
            self._require_known(tag)
            if tag not in self._released:
                raise ConflictError(f"{tag} is not released", remedy="GET /admin/v1/memory")

    def release(self, tags: Sequence[MemoryTag], *, keep: bool) -> None:
        """Give back the memory of every tag; a wrong one among them is found before any.

        Raises:
            ConflictError: a tag is released already, or a call on it failed before.
            UnsupportedError: a tag that this engine cannot release, or not alone.
        """
        self.require_mapped(tags)
        for tag in reversed(MEMORY_TAGS):
            if tag in tags:
                contents = keep and tag == "weights"
                self._attempt(tag, partial(self._backend.release, tag, keep=contents))
                self._released.add(tag)

    def restore(self, tags: Sequence[MemoryTag]) -> None:
        """Map the memory of every tag again.

        Raises:
            ConflictError: a tag is not released, or a call on it failed before.
        """
        self.require_released(tags)
        for tag in MEMORY_TAGS:
            if tag in tags:
                self._attempt(tag, partial(self._backend.restore, tag))
                self._released.remove(tag)

    def unreleased(self) -> dict[str, int]:
        """Bytes of the released tags that stayed resident, by the reason why."""
        found: dict[str, int] = {}
        for tag in self.released:
            for why, nbytes in self._backend.unreleased(tag).items():
                found[why] = found.get(why, 0) + nbytes
        return found

    def _require_known(self, tag: MemoryTag) -> None:
        if tag in self._broken:
            raise ConflictError(
                f"what became of {tag} is not known: {self._broken[tag]}",
                remedy="restart the engine",
            )

    def _attempt(self, tag: MemoryTag, call: Callable[[], None]) -> None:
        try:
            call()
        except SleepRefusedError:
            raise  # before anything happened
        except Exception as error:
            self._broken[tag] = f"{type(error).__name__}: {error}"
            raise
