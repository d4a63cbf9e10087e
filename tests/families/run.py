"""`make families`: judge the list of models on both engines, and write docs/families.md.

Verdicts are kept under build/families, a file for each, so that parts can be run on their own and
the page be written of all. Ends with 1 if a value or a token was wrong, or an update failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tests.families.catalogue import cases_of
from tests.families.family import ENGINES, LIVE, WAYS, Case
from tests.families.judge import FAILED, WRONG, Verdict
from tests.families.runner import judged
from tests.families.table import document
from tests.support.engine_server import ROOT

KEPT = ROOT / "build" / "families"
PAGE = ROOT / "docs" / "families.md"


def main() -> None:
    """Run what was chosen on every chosen engine, each in its environment."""
    chosen = _parsed()
    codes = []
    for kind in chosen.engine or ENGINES:
        if find_spec(kind) is None:
            codes.append(_in_its_environment(kind))
        else:
            codes.append(_run(kind, chosen))
    if chosen.page:
        PAGE.write_text(document({kind: _kept(kind) for kind in ENGINES}, _releases()))
    sys.exit(max(codes))


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", action="append", choices=ENGINES, help="by default both")
    parser.add_argument("--part", default="1/1", help="as 1/2: the first of two halves")
    parser.add_argument("--only", default="", help="names of models, with commas")
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--page", action="store_true", help="write docs/families.md at the end")
    return parser.parse_args()


def _in_its_environment(kind: str) -> int:
    """Do this engine's share of the same command with the Python that has the engine."""
    python = ROOT / ".venv" / kind / "bin" / "python"
    arguments = [each for each in sys.argv[1:] if each not in ("--page", "--engine", *ENGINES)]
    command = [str(python), "-m", "tests.families.run", *arguments, "--engine", kind]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def _run(kind: str, chosen: argparse.Namespace) -> int:
    """Judge this engine's cases one after the other; 1 if one was wrong or failed."""
    kept = KEPT / kind
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "releases").write_text(
        json.dumps({p: version(p) for p in (kind, "transformers", "torch")})
    )
    bad = 0
    with tempfile.TemporaryDirectory(prefix="engine-plugins-families-") as folder:
        for case in _chosen_cases(kind, chosen):
            verdict = _verdict(kind, case, Path(folder))
            (kept / f"{case.name}.json").write_text(json.dumps(asdict(verdict)))
            bad += verdict.result in (WRONG, FAILED)
            print(f"{kind} {case.name}: {verdict.result} {verdict.why[:300]}", flush=True)
    return int(bad > 0)


def _verdict(kind: str, case: Case, folder: Path) -> Verdict:
    if case.way != LIVE:
        return judged(kind, case, folder)
    importlib.import_module("tests.conftest")  # before transformers: SGLang's shims
    from tests.families.live import judged_live  # only then: it brings the whole sender along

    return judged_live(kind, case.family, folder / case.name)


def _chosen_cases(kind: str, chosen: argparse.Namespace) -> Iterator[Case]:
    number, _, parts = chosen.part.partition("/")
    names = set(filter(None, chosen.only.split(",")))
    for place, case in enumerate(cases_of(kind)):
        here = place % int(parts) == int(number) - 1
        wanted = not names or case.family.name in names
        if here and wanted and (not chosen.way or case.way in chosen.way):
            yield case


def _kept(kind: str) -> dict[str, Verdict]:
    files = (KEPT / kind).glob("*.json")
    return {file.stem: Verdict(**json.loads(file.read_text())) for file in files}


def _releases() -> dict[str, str]:
    releases: dict[str, str] = {}
    for kind in ENGINES:
        file = KEPT / kind / "releases"
        releases |= json.loads(file.read_text()) if file.exists() else {}
    return releases


if __name__ == "__main__":
    main()
