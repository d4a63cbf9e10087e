"""The version word: eight bytes beside a source, by which a reader sees that its bytes are whole.

Memory cannot be taken back from a reader: reads of memory that was deregistered succeed, and give
what lies there by then. So a source keeps a number in registered memory. The sender sets it before
an update and sends it with the request; it changes the number before anything else once it gives
up. A reader that finds another number after its last byte has read a mixture, whichever of its
bytes came late.
"""

from __future__ import annotations

import mmap
import secrets
from collections.abc import Callable, Sequence

import numpy as np

from engine_plugins.errors import (
    PeerLostError,
    SourceRevokedError,
    TransferTimeoutError,
    TransportError,
)
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.transport.base import PreparedTransfer, Transport
from engine_plugins.weights.transport.regions import HOST
from engine_plugins.weights.transport.transfers import run_transfers

__all__ = ["CLOSED", "WORD_BYTES", "VersionWord", "WordReader", "new_word"]

CLOSED = 0
"""In the word of a source that may not be read."""
WORD_BYTES = 8
CONFIRM_S = 1.0
"""Before a version is published: how long an answer is waited for that may never come."""
LOOK_S = 0.25
"""While the old weights serve: an engine does not stand still for longer because of a source."""

_lost: list[mmap.mmap] = []
"""Pages that a word may still be read into, at any time."""
_spare: list[mmap.mmap] = []
"""Pages of sources that were closed. They stay mapped, since a late reader of a page that is gone
would end this process, and serve the next sources: no number comes twice."""


def new_word() -> int:
    """A number for one update, which no other has; exact wherever JSON is read."""
    return secrets.randbits(52) + 1


class VersionWord:
    """A source's own word, in a page of its own.

    Args:
        transport: registers the page.

    Raises:
        TransportError: it cannot be registered.
    """

    def __init__(self, transport: Transport) -> None:
        self._page: mmap.mmap | None = _spare.pop() if _spare else _new_page()
        self._value = np.frombuffer(self._page, dtype="<u8", count=1)
        self._transport = transport
        self.address = int(self._value.ctypes.data)
        transport.register(self.address, WORD_BYTES, HOST)

    def set(self, word: int) -> None:
        """Let readers read that were told this number, and no others."""
        self._value[0] = word

    def close(self, *, agent_closed: bool = False) -> None:
        """Let nobody read, and take the registration back. Repeating it does nothing.

        Args:
            agent_closed: the transport has been closed, and the registration with it.
        """
        page, self._page = self._page, None
        if page is None:
            return
        self.set(CLOSED)
        if not agent_closed:
            self._transport.deregister(self.address)
        _spare.append(page)


def _new_page(nbytes: int = WORD_BYTES) -> mmap.mmap:
    """Memory in whole pages of its own: who forks or registers beside it does not disturb it."""
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class WordReader:
    """Reads the words of sources that were met, again and again.

    Args:
        manifests: of the sources.
        transport: does the reads.

    Attributes:
        reads: of the words, one of each source.
        usable: whether it may be asked again.

    Raises:
        TransportError: a word that cannot be read.
    """

    def __init__(self, manifests: Sequence[SourceManifest], transport: Transport) -> None:
        self._sources = [manifest.source for manifest in manifests]
        self._page: mmap.mmap | None = _new_page(WORD_BYTES * max(len(manifests), 1))
        self._found = np.frombuffer(self._page, dtype="<u8", count=len(manifests))
        self._address = int(self._found.ctypes.data)
        self._transport = transport
        transport.register(self._address, len(self._page), HOST)
        self._expected: list[int] = []
        self.reads: list[PreparedTransfer] = []
        self.usable = True
        try:
            for number, manifest in enumerate(manifests):
                into = self._address + number * WORD_BYTES
                row = np.array([[into, manifest.version_word, WORD_BYTES]], dtype=np.uint64)
                self.reads.append(
                    transport.prepare_read(
                        manifest.agent, row, local_device=HOST, remote_device=HOST
                    )
                )
        except BaseException:
            self.close()
            raise

    def begin(self, word: int | None) -> None:
        """Take the words that `reads` have brought before or with the first bytes.

        Args:
            word: what the update's caller says that they hold; None takes what they hold now.

        Raises:
            SourceRevokedError: a source holds another word: its caller has given this update up.
        """
        found: list[int] = self._found.tolist()
        self._expected = found if word is None else [word] * len(found)
        self._compare(found, "when the first bytes were read")

    def check(self, *, limit_s: float, cancelled: Callable[[], bool]) -> None:
        """See that the words are still those of `begin`, once every byte is here.

        Raises:
            SourceRevokedError: one is not: what was read may be a mixture.
            TransportError: one cannot be read, which proves as little.
        """
        try:
            found = self._read(limit_s, cancelled)
        except TransportError as error:
            error.message += "; so nothing shows that what was read before is of one version"
            raise
        self._compare(found, "once every byte was here")

    def confirm(self) -> None:
        """The same where all bytes were found whole already: a source may be gone by now.

        Raises:
            SourceRevokedError: a source that answers holds another word.
        """
        try:
            found = self._read(CONFIRM_S, lambda: False)
        except TransportError:
            return
        self._compare(found, "before the version was published")

    @property
    def expected(self) -> list[int]:
        """The words that the sources held at the begin."""
        return list(self._expected)

    def look(self, expected: Sequence[int] | None) -> None:
        """See whether the sources are still there.

        One that says nothing may be held still for a moment: it counts as there, and is not asked
        again.

        Args:
            expected: the words that they should hold; None where nobody told.

        Raises:
            PeerLostError: a source is gone.
            SourceRevokedError: one holds another word.
        """
        if not self.usable:
            return
        try:
            found = self._read(LOOK_S, lambda: False)
        except PeerLostError:
            raise
        except TransportError:
            return
        if expected is not None:
            self._expected = list(expected)
            self._compare(found, "while what was read waited for its commit")

    def close(self) -> None:
        """Release the reads and their buffer."""
        for read in self.reads:
            read.release()
        page, self._page = self._page, None
        if page is not None:
            self._transport.deregister(self._address)

    def quarantine(self) -> None:
        """Give up the page without freeing it: a read that timed out may still write to it."""
        self.usable = False
        page, self._page = self._page, None
        if page is not None:
            _lost.append(page)

    def _read(self, limit_s: float, cancelled: Callable[[], bool]) -> list[int]:
        try:
            # A page is soon replaced: what does not answer in time is not waited for any longer.
            run_transfers(self.reads, deadline_s=limit_s, drain_s=0.0, cancelled=cancelled)
        except TransportError as error:
            self.usable = False
            if isinstance(error, TransferTimeoutError) and error.stuck:
                self.quarantine()
            raise
        words: list[int] = self._found.tolist()
        return words

    def _compare(self, found: Sequence[int], when: str) -> None:
        moved = [
            source
            for source, before, now in zip(self._sources, self._expected, found, strict=True)
            if before != now or now == CLOSED
        ]
        if moved:
            more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
            raise SourceRevokedError(
                f"{', '.join(moved[:3])}{more} took the offer of these weights back, seen {when}: "
                "the trainer may have written to them meanwhile, so they are not installed",
                remedy="the trainer's own error says why it gave the update up; update again",
            )
