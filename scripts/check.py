"""The quick loop: lint beside the unit tests without engines: `check.py [ARGUMENT_OF_PYTEST ...]`.

The tests run in two halves, and lint as soon as one of them leaves a core.
"""

from __future__ import annotations

import sys

from run_tests import HALVES, pytest_run
from side_by_side import Run, run_all


def main(arguments: list[str]) -> int:
    """Run all; 0 if all passed, else the first other exit code."""
    halves = [pytest_run("vllm", *half, "-q", "-m", "core", *arguments) for half in HALVES]
    codes = run_all([*halves, Run("lint", ["make", "--no-print-directory", "lint"])])
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
