"""Run the tests of both engines side by side: `run_tests.py [ARGUMENT_OF_PYTEST ...]`.

Each engine's tests run in its own environment, two runs at once: starting servers and waiting for
them leaves much of a machine idle. What is printed is one run after the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = 2
NO_TESTS_COLLECTED = 5
LOOKED_AT_EVERY_S = 0.2


@dataclass
class Run:
    """One run of pytest in an engine's environment."""

    engine: str
    arguments: list[str]
    output: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    process: subprocess.Popen[bytes] | None = None
    shown: int = 0

    def start(self) -> None:
        """Begin it."""
        python = ROOT / ".venv" / self.engine / "bin" / "python"
        self.process = subprocess.Popen(
            [python, "-m", "pytest", "tests", *self.arguments],
            cwd=ROOT,
            stdout=self.output,
            stderr=subprocess.STDOUT,
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


def main(arguments: list[str]) -> int:
    """Run them; 0 if all passed, else the first other exit code."""
    runs = [Run("vllm", arguments), Run("sglang", arguments)]
    if not arguments:  # what knows no engine is run once, and quickest at the end
        engines = ["-m", "not core"]
        runs = [Run("vllm", engines), Run("sglang", engines), Run("vllm", ["-m", "core"])]
    try:
        _run_all(runs)
    finally:  # of an interrupt each was told too, and cleans up
        for run in runs:
            if run.process is not None:
                run.process.wait()
    codes = [run.code or 0 for run in runs]
    for run, code in zip(runs, codes, strict=True):
        print(f"{run.engine} {' '.join(run.arguments)}: exit code {code}", flush=True)
    # What was asked for may be tests of one engine alone.
    if arguments and set(codes) != {NO_TESTS_COLLECTED}:
        codes = [0 if code == NO_TESTS_COLLECTED else code for code in codes]
    return next((code for code in codes if code), 0)


def _run_all(runs: list[Run]) -> None:
    """Start each as soon as there is a place, and print them in their order."""
    for run in runs:
        print(f"{'=' * 20} {run.engine}: {' '.join(run.arguments)} {'=' * 20}", flush=True)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
