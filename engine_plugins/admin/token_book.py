"""The admin tokens of this server: one for everything, and a file of `scope token` lines.

The file is looked at for every request, so that a new token counts at once and one that was taken
out no longer does. What is wrong with it is for the server's log: whoever asks may be a stranger.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import hmac
import logging
import os
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from engine_plugins.settings import PREFIX, Settings

__all__ = ["TokenBook", "TokenScope"]

logger = logging.getLogger(__name__)

TokenScope = Literal["read", "control", "weights"]
ALL_SCOPES: frozenset[TokenScope] = frozenset(get_args(TokenScope))
PATIENCE_S = 1.0
"""How long a request waits for a file system that does not answer."""
MAX_FILE_BYTES = 1 << 20
SHORT = 16
"""Characters; a token of fewer can be guessed over a network."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    token: bytes = field(repr=False)
    scopes: frozenset[TokenScope]


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What one look at the file has found; `trouble` is why there is no content."""

    content: bytes = field(default=b"", repr=False)
    mode: int = 0
    trouble: str = ""


class TokenBook:
    """Who may do what on this server.

    A file that is gone or cannot be read has no tokens. One whose file system does not answer at
    all says nothing about its tokens: those that were read last hold, and nobody waits longer than
    `PATIENCE_S`. The environment's token holds whatever becomes of the file.
    """

    def __init__(self, settings: Settings) -> None:
        token = settings.admin_token
        self._single: list[_Entry] = []
        if token:
            plain = token.encode("utf-8", "surrogateescape")
            self._single = [_Entry(token=plain, scopes=ALL_SCOPES)]
            _warn_of_length(f"{PREFIX}ADMIN_TOKEN", plain)
        self._file = settings.admin_token_file
        self._from_file: list[_Entry] = []
        self._seen: _Look | None = None
        self._looking: asyncio.Future[_Look] | None = None
        self._silent = False

    @property
    def configured(self) -> bool:
        """Whether there is any token at all."""
        return bool(self._single or self._from_file)

    def scopes_of(self, token: bytes) -> frozenset[TokenScope] | None:
        """Scopes of a token, or None if nobody has it. Takes as long for any token."""
        granted: frozenset[TokenScope] | None = None
        for entry in self._single + self._from_file:
            if hmac.compare_digest(entry.token, token):
                granted = (granted or frozenset()) | entry.scopes
        return granted

    async def refresh(self) -> None:
        """Take in what the file says now, without standing still if it says nothing."""
        if self._file is None:
            return
        if self._looking is None:
            self._looking = _look_in_a_thread(self._file)
        elif self._silent:
            return
        looking = self._looking
        await asyncio.wait({looking}, timeout=PATIENCE_S)
        if looking.done():
            self._take(looking)
        elif not self._silent:
            self._silent = True
            looking.add_done_callback(self._take)
            logger.error(
                "%sADMIN_TOKEN_FILE: %s has not answered for %g s; the tokens that were read last "
                "hold until it does",
                *(PREFIX, self._file, PATIENCE_S),
            )

    def _take(self, looking: asyncio.Future[_Look]) -> None:
        if self._looking is not looking:
            return  # another request that waited for the same look has taken it
        self._looking, self._silent = None, False
        found = looking.result()
        if found != self._seen:
            self._seen = found
            self._from_file = _entries(self._file, found)


def _look_in_a_thread(path: Path) -> asyncio.Future[_Look]:
    """Look at a file in a thread of its own, which ends with the process however long it hangs."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Look] = loop.create_future()

    def look() -> None:
        found = _look(path)
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(future.set_result, found)

    threading.Thread(target=look, name="admin tokens", daemon=True).start()
    return future


def _look(path: Path) -> _Look:
    try:
        # Without O_NONBLOCK a FIFO holds its reader until somebody writes.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                return _Look(trouble="is no regular file")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                content = file.read(MAX_FILE_BYTES + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        return _Look(trouble=f"cannot be read ({getattr(error, 'strerror', error)})")
    if len(content) > MAX_FILE_BYTES:
        return _Look(trouble=f"has more than {MAX_FILE_BYTES} bytes")
    return _Look(content=content, mode=stat.S_IMODE(mode))


def _entries(path: Path | None, found: _Look) -> list[_Entry]:
    """The tokens of a file, each line on its own; what is wrong with one is told in the log."""
    name = f"{PREFIX}ADMIN_TOKEN_FILE: {path}"
    if found.trouble:
        logger.error("%s %s; its tokens are closed until it is mended", name, found.trouble)
        return []
    if found.mode & 0o077:
        logger.warning(
            "%s has mode %03o: others on this machine can read or change it; chmod 600 it",
            *(name, found.mode),
        )
    entries = []
    lines = found.content.removeprefix(codecs.BOM_UTF8).splitlines()
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        scope = next((each for each in ALL_SCOPES if each.encode() == words[0]), None)
        if len(words) != 2 or scope is None:
            logger.error(
                "%s, line %d is not `scope token` with scope %s, so it opens nothing",
                *(name, number, ", ".join(sorted(ALL_SCOPES))),
            )
            continue
        _warn_of_length(f"{name}, line {number}", words[1])
        entries.append(_Entry(token=words[1], scopes=frozenset({scope})))
    return entries


def _warn_of_length(where: str, token: bytes) -> None:
    if len(token) < SHORT:
        logger.warning(
            "%s: a token of %d characters can be guessed; take %d or more, at random",
            *(where, len(token), SHORT),
        )
