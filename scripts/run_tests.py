"""Run the tests of both engines side by side: `run_tests.py [ARGUMENT_OF_PYTEST ...]`.

Each engine's tests run in its own environment. Starting servers and waiting for them leaves much of
a machine idle, so two runs take little longer than one. What the second one prints follows when the
first has ended.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
LIVE, HELD_BACK = "vllm", "sglang"
WITHOUT_ARGUMENTS = {LIVE: [], HELD_BACK: ["-m", "not core"]}
"""Tests that know no engine run once."""
NO_TESTS_COLLECTED = 5
FOLLOWED_EVERY_S = 0.2


def main(arguments: list[str]) -> int:
    """Run both; 0 if all passed, else the first other exit code."""
    runs: dict[str, subprocess.Popen[bytes]] = {}
    with tempfile.NamedTemporaryFile() as held_back:
        try:
            runs[HELD_BACK] = _started(HELD_BACK, arguments, held_back)
            runs[LIVE] = _started(LIVE, arguments, None)
            runs[LIVE].wait()
            print(f"\n{'=' * 30} tests of {HELD_BACK} {'=' * 30}", flush=True)
            _follow(Path(held_back.name), runs[HELD_BACK])
        except KeyboardInterrupt:
            pass  # they were interrupted too, and clean up
        except BaseException:
            for run in runs.values():
                run.terminate()
            raise
        finally:
            for run in runs.values():
                run.wait()
    codes = {name: run.returncode for name, run in runs.items()}
    for name, code in codes.items():
        print(f"tests of {name}: exit code {code}", flush=True)
    # What was asked for may be tests of the other engine alone.
    passed = {0, NO_TESTS_COLLECTED} if arguments else {0}
    if set(codes.values()) == {NO_TESTS_COLLECTED}:
        return NO_TESTS_COLLECTED
    return next((code for code in codes.values() if code not in passed), 0)


def _started(name: str, arguments: list[str], output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    python = ROOT / ".venv" / name / "bin" / "python"
    return subprocess.Popen(
        [python, "-m", "pytest", "tests", *(arguments or WITHOUT_ARGUMENTS[name])],
        cwd=ROOT,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
    )


def _follow(output: Path, run: subprocess.Popen[bytes]) -> None:
    """Print what a run has said and says, until it has ended."""
    with output.open("rb") as file:
        ended = False
        while not ended:
            ended = run.poll() is not None
            sys.stdout.buffer.write(file.read())
            sys.stdout.flush()
            if not ended:
                time.sleep(FOLLOWED_EVERY_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
