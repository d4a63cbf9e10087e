"""The quick loop: lint beside the unit tests without engines: `check.py [ARGUMENT_OF_PYTEST ...]`.

All at once: the tests, in two halves, wait now and then.
"""

from __future__ import annotations

import sys

from run_tests import HALVES, outcome, pytest_run
from side_by_side import Run, run_all


def main(arguments: list[str]) -> int:
    """Run all; 0 if all passed, else the first other exit code."""
    halves = [pytest_run("vllm", *half, "-q", "-m", "core", *arguments) for half in HALVES]
    lint = Run("lint", ["make", "--no-print-directory", "lint"])
    return outcome(run_all([lint, *halves], at_once=3))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
