"""Run the tests of both engines side by side: `run_tests.py [ARGUMENT_OF_PYTEST ...]`.

Each engine's tests run in its own environment, two runs at once. What knows no engine is run once,
in vLLM's, in two halves, which fill what the longer runs leave. What is printed is one run after
the other.
"""

from __future__ import annotations

import sys

from side_by_side import ROOT, Run, run_all

NO_TESTS_COLLECTED = 5
ENGINES = ("sglang", "vllm")
"""The longer run first."""
HALVES = (["tests/unit/weights"], ["tests/unit", "--ignore=tests/unit/weights"])
"""Of the unit tests: about as long as each other."""


def pytest_run(engine: str, *arguments: str) -> Run:
    """Pytest in an engine's environment."""
    python = ROOT / ".venv" / engine / "bin" / "python"
    return Run(f"{engine}: {' '.join(arguments)}", [python, "-m", "pytest", *arguments])


def main(arguments: list[str]) -> int:
    """Run them; 0 if all passed, else the first other exit code."""
    if arguments:  # which may be of tests of one engine alone
        codes = run_all([pytest_run(engine, "tests", *arguments) for engine in ENGINES])
        if set(codes) != {NO_TESTS_COLLECTED}:
            codes = [0 if code == NO_TESTS_COLLECTED else code for code in codes]
    else:
        engines = [pytest_run(engine, "tests", "-m", "not core") for engine in ENGINES]
        others = ["tests", "--ignore=tests/unit"]
        halves = [pytest_run("vllm", *half, "-m", "core") for half in (others, *HALVES)]
        codes = run_all([*engines, *halves])
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
