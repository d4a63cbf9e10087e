"""Commands side by side, as many at once as this says; what they print comes one after the other.

Starting servers and waiting for them leaves much of a machine idle.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

__all__ = ["ROOT", "Run", "run_all"]

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = 2
LOOKED_AT_EVERY_S = 0.2


@dataclass
class Run:
    """One command.

    Attributes:
        name: what it is called in the output.
        command: a program and its arguments.
    """

    name: str
    command: Sequence[str | Path]
    output: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    process: subprocess.Popen[bytes] | None = None
    began_s: float = 0.0
    shown: int = 0

    def start(self) -> None:
        """Begin it."""
        self.began_s = time.monotonic()
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, stdout=self.output, stderr=subprocess.STDOUT
        )

    @property
    def code(self) -> int | None:
        """Its exit code; `None` before its end."""
        return None if self.process is None else self.process.poll()

    def show(self) -> None:
        """Print what it has said since the last time."""
        while said := os.pread(self.output.fileno(), 1 << 16, self.shown):
            self.shown += len(said)
            sys.stdout.buffer.write(said)
        sys.stdout.flush()


def run_all(runs: Sequence[Run]) -> list[int]:
    """Run them in their order, each as soon as there is a place; their exit codes."""
    try:
        for run in runs:
            print(f"{'=' * 20} {run.name} {'=' * 20}", flush=True)
            _run_until_over(run, runs)
    finally:  # of an interrupt each was told too, and cleans up
        for run in runs:
            if run.process is not None:
                run.process.wait()
    codes = [run.code or 0 for run in runs]
    for run, code in zip(runs, codes, strict=True):
        print(f"{run.name}: exit code {code}", flush=True)
    return codes


def _run_until_over(run: Run, runs: Sequence[Run]) -> None:
    """Print a run to its end, and meanwhile start those for which there is a place."""
    is_over = False
    while not is_over:
        running = [each for each in runs if each.process is not None and each.code is None]
        waiting = [each for each in runs if each.process is None]
        for each in waiting[: AT_ONCE - len(running)]:
            each.start()
        is_over = run.code is not None
        run.show()
        if not is_over:
            time.sleep(LOOKED_AT_EVERY_S)
