"""Optional parts of ours that a server has to do without, and why: noted by whom they failed.

A server serves without them, so each failure is told where somebody looks: in the log, and in
the State for as long as the server lives.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from engine_plugins.admin.runtime_dir import RUNTIME_DIR

__all__ = ["absent_parts", "note_absent"]

_FOLDER = "absent"
_LONGEST = 2000

logger = logging.getLogger(__name__)


def note_absent(part: str, why: Exception | str) -> None:
    """Note that this server has no such part; never raises.

    Args:
        part: its name in the State.
        why: what went wrong.
    """
    reason = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
    logger.warning("this engine has no %s: %s", part, reason)
    folder = os.environ.get(RUNTIME_DIR)
    if folder is None:
        return
    try:
        Path(folder, _FOLDER).mkdir(mode=0o700, exist_ok=True)
        Path(folder, _FOLDER, part).write_text(reason[:_LONGEST])
    except OSError as error:
        logger.warning("the State does not tell it: %s", error)


def absent_parts(runtime_dir: Path) -> dict[str, str]:
    """The parts that this server has not, with the reasons."""
    try:
        return {each.name: each.read_text() for each in sorted((runtime_dir / _FOLDER).iterdir())}
    except OSError:  # nobody has noted any
        return {}
