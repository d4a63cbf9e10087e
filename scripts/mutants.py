"""`make mutants`: how many of a fixed sample of mutants the unit tests kill.

Mutants come from mutmut, which changes one expression of one function at a time, in a copy of the
tree (`mutants/`), and runs those tests that call the function until one fails. Each file's sample
depends on that file only, so two commits are compared mutant by mutant where a file is the same.
Not sampled: code outside functions and properties, which mutmut does not change.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.stats import status_by_exit_code
from mutmut.utils.format_utils import get_mutant_name

COPY = Path(__file__).resolve().parent.parent / "mutants"
SEED = 300
SAMPLE_SIZES = {
    "engine_plugins/weights/planning/plan.py": 110,
    "engine_plugins/weights/loader/coverage.py": 75,
    "engine_plugins/admin/auth.py": 75,
    "engine_plugins/admin/state.py": 40,
    "engine_plugins/admin/route_table.py": 50,
}
"""Mutants drawn from each file; all of a file that has fewer."""


def main(argv: list[str] | None = None) -> int:
    """Draw the sample, run it and print the score of each file and the survivors' diffs."""
    parser = argparse.ArgumentParser(description="Run a fixed sample of mutants.")
    parser.add_argument("--max-children", type=int, default=2, help="mutants run at once")
    parser.add_argument("files", nargs="*", default=list(SAMPLE_SIZES), help="default: all")
    options = parser.parse_args(argv)
    samples = {Path(file): sample(Path(file)) for file in options.files}
    names = [name for chosen in samples.values() for name in chosen]
    if code := run_mutmut(names, options.max_children):
        return code
    for file, chosen in samples.items():
        report(file, chosen)
    return 0


def sample(file: Path) -> list[str]:
    """Names of the mutants drawn from a file, the same ones every time."""
    made = mutate_file_contents(str(file), file.read_text()).mutant_names
    names = [get_mutant_name(file, name) for name in made]
    size = min(SAMPLE_SIZES[str(file)], len(names))
    return random.Random(f"{SEED} {file}").sample(names, size)


def run_mutmut(names: list[str], max_children: int) -> int:
    """Run these mutants in a new copy of the tree; returns mutmut's exit code."""
    # Tests that were deleted since the last run would still be in an old copy.
    shutil.rmtree(COPY, ignore_errors=True)
    # Processes that tests start import the copy too. Python looks for no module in a folder of
    # PYTHONPATH that it did not find when it started.
    folders = [COPY, COPY / "kernels"]
    folders[-1].mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    mutmut = Path(sys.executable).with_name("mutmut")
    command = [str(mutmut), "run", "--max-children", str(max_children), *names]
    return subprocess.run(command, check=False, env=environment).returncode


def report(file: Path, chosen: list[str]) -> None:
    """Print a file's score and the difference that each mutant not killed makes."""
    results = SourceFileMutationData(path=file)
    results.load()
    status = {name: status_by_exit_code[results.exit_code_by_key[name]] for name in chosen}
    score = ", ".join(f"{count} {what}" for what, count in Counter(status.values()).most_common())
    print(f"\n{file}: {len(chosen)} mutants: {score}")
    for name in chosen:
        if status[name] != "killed":
            print(f"\n{name}: {status[name]}\n{get_diff_for_mutant(name, path=file)}")


if __name__ == "__main__":
    sys.exit(main())
