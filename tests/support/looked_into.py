"""Servers whose processes can be looked into: what of ours is loaded there, and what is hooked.

A process of theirs that is sent `LOOK` says in a file what it finds of ours in itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

__all__ = ["FOLDER", "look_into"]

LOOK = signal.SIGRTMIN + 7
FOLDER = "TESTS_LOOK_FOLDER"
_OURS = ("engine_plugins", "engine_kernels", "vllm_ext", "sglang_ext")
_PLUGINS = ("vllm_ext", "vllm_ext.plugin", "vllm_ext.asked", "sglang_ext", "sglang_ext.plugin")
"""What an engine loads of ours, whoever asked for us or not."""


WITHIN_S = 30.0


def look_into(pid: int, folder: Path, hooked: list[str]) -> dict[str, Any]:
    """What each Python process of a server tells, by its pid: `modules` and `hooked` of ours.

    Args:
        pid: of the server's first process.
        folder: that `FOLDER` names in the server's environment.
        hooked: the engine's functions that we may have hooked, as `module.path`.
    """
    (folder / "asked").write_text(json.dumps(hooked))
    for before in folder.glob("*.told"):
        before.unlink()
    first = psutil.Process(pid)
    asked = []
    for each in (first, *first.children(recursive=True)):
        if _catches(each.pid):
            each.send_signal(LOOK)
            asked.append(each.pid)
    deadline = time.monotonic() + WITHIN_S
    while not all((folder / f"{each}.told").exists() for each in asked):
        assert time.monotonic() < deadline, f"of {asked} some have not told"
        time.sleep(0.05)
    return {str(each): json.loads((folder / f"{each}.told").read_text()) for each in asked}


def _catches(pid: int) -> bool:
    """Whether a process handles the signal, which would end any other."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (LOOK - 1) & 1)


def _tell(number: int, frame: FrameType | None) -> None:
    folder = Path(os.environ[FOLDER])
    modules = sorted(
        name for name in sys.modules if name.partition(".")[0] in _OURS and name not in _PLUGINS
    )
    asked = json.loads((folder / "asked").read_text())
    hooked = sorted(name for name in asked if _is_ours(_find(name)))
    told = folder / f"{os.getpid()}.tmp"
    told.write_text(json.dumps({"modules": modules, "hooked": hooked}))
    told.rename(folder / f"{os.getpid()}.told")


def _find(name: str) -> Any:
    """What has a name, if its module is loaded."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:end]))
        if found is not None:
            for part in parts[end:]:
                found = getattr(found, part, None)
            return found
    return None


def _is_ours(function: Any) -> bool:
    """Whether a function, or anything that it is wrapped in, is code of ours, or calls such."""
    while function is not None:
        code = getattr(function, "__code__", None)
        cells = getattr(function, "__closure__", None) or ()
        files = [getattr(code, "co_filename", "")]
        for cell in cells:
            held = cell.cell_contents
            files.append(getattr(getattr(held, "__code__", None), "co_filename", ""))
        if any(f"/{name}/" in file for name in _OURS for file in files):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


if FOLDER in os.environ:
    signal.signal(LOOK, _tell)
