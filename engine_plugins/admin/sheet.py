"""Bytes that every process of a server sees, kept apart by the generation of whoever writes them.

A generation ends when another process takes the place of one that does not answer. That one may
wake up half way through a write, so the next generation writes elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine_plugins.shared_page import SharedPage

__all__ = ["COPIES", "Sheet"]

COPIES = 2
"""Two generations have places of their own; a third one takes the first one's."""
_MARK_BYTES = 8


class Sheet:
    """The newest bytes of the newest generation that wrote any."""

    def __init__(self, pages: Sequence[SharedPage]) -> None:
        self._pages = pages

    def sequence(self, generation: int) -> int:
        """Another number after each write of a generation."""
        return self._place(generation).sequence

    def read(self, generation: int) -> tuple[int, bytes]:
        """Who wrote last, not counting generations to come, and what; 0 and nothing before."""
        bodies = [page.read()[1] for page in self._pages]
        written = [(_generation_of(body), body[_MARK_BYTES:]) for body in bodies if body]
        return max(
            (each for each in written if each[0] <= generation), key=_first, default=(0, b"")
        )

    def write(self, generation: int, body: bytes, before_it_shows: Callable[[], None]) -> None:
        """Replace the bytes; see `SharedPage.write`."""
        mark = generation.to_bytes(_MARK_BYTES, "little")
        self._place(generation).write(mark + body, before_it_shows)

    def _place(self, generation: int) -> SharedPage:
        return self._pages[generation % len(self._pages)]


def _generation_of(body: bytes) -> int:
    return int.from_bytes(body[:_MARK_BYTES], "little")


def _first(pair: tuple[int, bytes]) -> int:
    return pair[0]
