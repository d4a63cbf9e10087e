"""Programs of several processes, of which none outlives its test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

__all__ = ["output_of_ranks"]

_PROJECT = Path(__file__).parents[2]


def output_of_ranks(module: str, *arguments: str, **environment: str) -> str:
    """What a module prints that runs the ranks of a gloo group; it must end well."""
    program = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=_PROJECT,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        said, errors = program.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode == 0, errors
    return said
