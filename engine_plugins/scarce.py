"""What a machine has run out of, as an error of ours that says what to do."""

from __future__ import annotations

import errno
from pathlib import Path

from engine_plugins.errors import EnginePluginError, ServerFilesError

__all__ = ["explained"]

_REMEDIES = {
    errno.ENOSPC: "free space on the disk of {where}, or start the server with TMPDIR elsewhere",
    errno.EDQUOT: "free space in the quota of {where}, or start the server with TMPDIR elsewhere",
    errno.EFBIG: "raise the limit of file sizes of the server's processes (ulimit -f)",
    errno.EROFS: "mount the disk of {where} for writing",
    errno.EMFILE: "close connections to the server, or raise its limit of open files (ulimit -n)",
    errno.ENFILE: "raise the machine's limit of open files (sysctl fs.file-max)",
}


def explained(error: Exception, where: Path | None = None) -> EnginePluginError:
    """An error of the operating system, or one that nobody foresaw, as one of ours.

    Args:
        error: what was raised.
        where: the directory that it is about, where that is known.
    """
    number = error.errno if isinstance(error, OSError) else None
    said = f"{type(error).__name__}: {error}"
    if where is None and number not in _REMEDIES:
        return EnginePluginError(said)
    at = "this server" if where is None else f"the server's directory {where}"
    remedy = _REMEDIES.get(number or 0, "restart the server, if {where} was removed or given away")
    return ServerFilesError(
        f"{at} lacks what a file needs: {said}",
        remedy=remedy.format(where=where or "its temporary folder"),
    )
