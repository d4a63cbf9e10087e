"""What servers left that ended without a chance to clear up, and who may take it away.

A runtime directory is a dead server's if its owner is noted in it, lived in this pid namespace,
is gone, and no process of its server holds the directory any more. Anything else is left alone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from pathlib import Path

import msgspec

from engine_plugins.sleep.process_identity import ProcessIdentity, identify, presence

__all__ = ["clear_dead_servers", "note_owner"]

_NOTE = "owner"

logger = logging.getLogger(__name__)


def note_owner(runtime_dir: Path) -> None:
    """Leave in a directory who has laid it out: this process."""
    (runtime_dir / _NOTE).write_bytes(msgspec.json.encode(identify()))


def clear_dead_servers(folder: Path, prefix: str) -> None:
    """Remove the runtime directories in a folder whose servers are dead; never raises."""
    for path in folder.glob(f"{prefix}*"):
        try:
            _clear_if_dead(path)
        except (OSError, msgspec.MsgspecError) as error:
            logger.debug("left %s alone: %s", path, error)


def _clear_if_dead(path: Path) -> None:
    """Remove a directory that nobody holds and whose owner has ended.

    Raises:
        OSError: it is held, no directory, or not this user's to open.
        MsgspecError: nobody that we know has laid it out.
    """
    held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = msgspec.json.decode((path / _NOTE).read_bytes(), type=ProcessIdentity)
        # Of another pid namespace, unless the machine has restarted, one is not known to be gone.
        if os.fstat(held).st_uid == os.getuid() and presence(owner) in ("gone", "reused"):
            shutil.rmtree(path)
            logger.info("removed %s, which a server left that has ended", path)
    finally:
        os.close(held)
