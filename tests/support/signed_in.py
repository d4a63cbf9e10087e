"""Processes that have signed in as an engine's, and do nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["signed_in"]

_PROGRAM = """
import sys, time
from pathlib import Path
from engine_plugins.admin.engine_processes import sign_in
sign_in(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
print(flush=True)
time.sleep(600)
"""


@contextmanager
def signed_in(runtime_dir: Path, role: str, rank: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process of an engine for as long as a context lasts, if nobody ends it before."""
    command = [sys.executable, "-c", _PROGRAM, str(runtime_dir), role, str(rank)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()
