"""What the servers of this host are about to stage, so that those that begin together see it.

A receive buffer is reserved at first, and its memory counts as free, for everybody, until bytes
come. A server that drives one of eight engines of a host must not take a quarter eight times.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["StagingClaims"]

_FOLDER = Path("/dev/shm")
"""One place for all servers of the host, whatever TMPDIR each of them has."""
_CLAIM = "claim-"


class StagingClaims:
    """The claims of one user's servers, each a file that its server holds locked.

    The kernel unlocks it when the server dies, so no claim outlives its server. Servers of other
    containers, which have a folder of their own, are not seen.

    Args:
        folder: where claims lie.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or _FOLDER / f"engine-plugins-staging-{os.getuid()}"

    @contextmanager
    def claimed(self, nbytes: int) -> Iterator[int]:
        """Claim so many bytes for as long as the context lasts; what other servers claim now.

        The own claim is there before others are read: of two servers at least one sees the other.
        Where no file can be had, nothing is claimed, and others count as 0.
        """
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, exist_ok=True)
        try:
            file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed below
                dir=self._folder, prefix=".claim-", delete=False
            )
        except OSError:
            yield 0
            return
        path = Path(file.name)
        shown = path.with_name(_CLAIM + path.name.removeprefix(".claim-"))
        try:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
                os.write(file.fileno(), b"%d" % nbytes)
                # Seen by others only now: one that is not locked is taken for a dead server's.
                path.rename(shown)
            yield sum(self._others(shown))
        finally:
            for each in (path, shown):
                with suppress(OSError):
                    each.unlink(missing_ok=True)
            file.close()

    def clear_dead(self) -> None:
        """Remove what servers left that died with a claim; the own one must not be there yet."""
        for _ in self._others(self._folder):
            pass

    def _others(self, own: Path) -> Iterator[int]:
        paths: list[Path] = []
        with suppress(OSError):
            paths = list(self._folder.glob(f"{_CLAIM}*"))
        for path in paths:
            if path != own:
                with suppress(OSError), path.open("rb") as file:
                    yield _bytes_of(file.fileno(), path)


def _bytes_of(file: int, path: Path) -> int:
    """What a claim is of; one that nobody holds is removed."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(file, 32, 0))
    path.unlink(missing_ok=True)
    return 0
