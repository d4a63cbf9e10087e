"""Files that the processes of a server keep for each other, in folders of its runtime directory.

Nothing that an engine's state depends on lies here: a disk may be full, descriptors used up, and a
folder for temporary files may be cleared under a running server.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from engine_plugins.scarce import explained

__all__ = ["KeptFile", "RuntimeFiles"]


class KeptFile(NamedTuple):
    """A file as a listing shows it."""

    used_at: float
    """Unix seconds."""
    name: str
    size: int


class RuntimeFiles:
    """One folder of a runtime directory, made when it is needed, also if it was removed."""

    def __init__(self, runtime_dir: Path, folder: str) -> None:
        self._runtime_dir = runtime_dir
        self.folder = runtime_dir / folder

    def put(self, name: str, body: bytes) -> None:
        """Keep a file for all processes; it appears whole or not at all.

        Raises:
            ServerFilesError: no room for it, say; nothing of it is left.
        """
        # One for each call: two of a process may bring the same file at once.
        temporary = self.folder / f"{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            try:
                temporary.write_bytes(body)
            except FileNotFoundError:
                self._make()
                temporary.write_bytes(body)
            temporary.replace(self.folder / name)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise explained(error, self.folder) from error

    def get(self, name: str) -> bytes | None:
        """A file kept by any process, or None. Names are ours, never a caller's."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise explained(error, self.folder) from error

    def listed(self) -> list[KeptFile]:
        """What is kept here, longest unused first."""
        found: list[KeptFile] = []
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):  # another process has just dropped it
                        if not entry.name.endswith(".tmp"):
                            status = entry.stat()
                            found.append(KeptFile(status.st_mtime, entry.name, status.st_size))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise explained(error, self.folder) from error
        return sorted(found)

    def free_bytes(self) -> int:
        """What the disk has left, or the memory that stands for one."""
        for folder in (self.folder, self._runtime_dir.parent):
            with suppress(OSError):
                return shutil.disk_usage(folder).free
        return 0

    def touch(self, name: str) -> bool:
        """Count a file as used now; whether it is here."""
        try:
            os.utime(self.folder / name)
        except OSError:
            return False
        return True

    def drop(self, names: Iterable[str]) -> None:
        """Forget files; one that cannot be removed is tried again when others are."""
        for name in names:
            with suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)

    def _make(self) -> None:
        """Make the folder again, which may be of nobody but us."""
        for path in (self._runtime_dir, self.folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                raise PermissionError(errno.EPERM, "the folder is another user's", str(path))
