"""Commands side by side; what they print comes one after the other."""

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
    shown: int = 0

    def start(self) -> None:
        """Begin it."""
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


def run_all(runs: Sequence[Run], *, at_once: int) -> list[int]:
    """Run so many at once, in their order; their exit codes."""
    try:
        for run in runs:
            print(f"{'=' * 20} {run.name} {'=' * 20}", flush=True)
            _run_until_over(run, runs, at_once)
    finally:  # of an interrupt each was told too, and cleans up
        for run in runs:
            if run.process is not None:
                run.process.wait()
    codes = [run.code or 0 for run in runs]
    for run, code in zip(runs, codes, strict=True):
        print(f"{run.name}: exit code {code}", flush=True)
    return codes


def _run_until_over(run: Run, runs: Sequence[Run], at_once: int) -> None:
    """Print a run to its end, and meanwhile start those for which there is a place."""
    is_over = False
    while not is_over:
        running = [each for each in runs if each.process is not None and each.code is None]
        waiting = [each for each in runs if each.process is None]
        for each in waiting[: max(0, at_once - len(running))]:
            each.start()
        is_over = run.code is not None
        run.show()
        if not is_over:
            time.sleep(LOOKED_AT_EVERY_S)
