"""Run the tests of both engines side by side: `run_tests.py [ARGUMENT_OF_PYTEST ...]`.

Each engine's tests run in its own environment. What knows no engine is run once, in vLLM's, in
three parts, one after the other beside those. What is printed is one run after the other.
"""

from __future__ import annotations

import sys

from side_by_side import ROOT, Run, run_all

AT_ONCE = 3
"""One more than cores: servers are waited for, and wait."""
NO_TESTS_COLLECTED = 5
ENGINES = ("sglang", "vllm")
"""The longer run first."""
FIRST_HALF = (
    "tests/unit/prefill_gate",
    "tests/unit/weights",
    "tests/unit/test_fp8_sender.py",
    "tests/unit/test_trainer_sender.py",
)
"""Of the unit tests; with all that starts ranks of a trainer, whose imports are made once."""
HALVES = (FIRST_HALF, ("tests/unit", *(f"--ignore={path}" for path in FIRST_HALF)))


def pytest_run(engine: str, *arguments: str) -> Run:
    """Pytest in an engine's environment."""
    python = ROOT / ".venv" / engine / "bin" / "python"
    return Run(f"{engine}: {' '.join(arguments)}", [python, "-m", "pytest", *arguments])


def outcome(codes: list[int]) -> int:
    """0 if all passed, else the first other code; that there was nothing to run, only of all."""
    found = [code for code in codes if code != NO_TESTS_COLLECTED]
    return next((code for code in found if code), 0 if found else NO_TESTS_COLLECTED)


def main(arguments: list[str]) -> int:
    """Run them; 0 if all passed, else the first other exit code."""
    if arguments:  # which may be of tests of one engine alone
        runs = [pytest_run(engine, "tests", *arguments) for engine in ENGINES]
        return outcome(run_all(runs, at_once=AT_ONCE))
    else:
        engines = [pytest_run(engine, "tests", "-m", "not core") for engine in ENGINES]
        others = ["tests", "--ignore=tests/unit"]
        halves = [pytest_run("vllm", *half, "-m", "core") for half in (others, *HALVES)]
        return outcome(run_all([*engines, *halves], at_once=AT_ONCE))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
