"""`make chaos-update`: weight updates under load and faults, every token of every answer judged.

Ends with 1 if an answer was wrong or lied about its version, or an engine that lives was not
repaired by a good update.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from tests.chaos_update.cases import Case, cases, part_of
from tests.chaos_update.product import run_with

OUT = Path("build") / "chaos-update"


def main() -> None:
    """Run the cases that are asked for."""
    chosen = _arguments()
    if chosen.product is not None:
        run_with(chosen.product)
    # Only now, since these import the product.
    from tests.chaos_update import report
    from tests.chaos_update.episode import run_case
    from tests.chaos_update.fleet import Fleet
    from tests.chaos_update.models import Models

    numbered = _chosen(chosen)
    if chosen.list:
        for number, case in numbered:
            print(number, case)
        return
    # Before UCX loads, here and in every child: over tcp it would listen on other addresses too.
    os.environ |= {"UCX_NET_DEVICES": "lo", "OMP_NUM_THREADS": "1"}
    kept = chosen.out / "results.jsonl"
    failed = False
    with tempfile.TemporaryDirectory(prefix="chaos-update-") as temporary:
        folder, began = Path(temporary), time.monotonic()
        models = Models(folder / "models")
        fleet = Fleet(models, folder)
        try:
            for number, case in numbered:
                result = run_case(case, fleet, folder)
                failed = failed or not result.holds
                report.keep(kept, number, result)
                print(report.line(number, result), flush=True)
                if not result.holds or chosen.verbose:
                    print("    " + "\n    ".join([*result.notes, str(result.laps_s)]), flush=True)
        finally:
            fleet.close()
    results = report.kept(kept)
    told = f"{report.summary(list(results.values()))}\n\n{report.table(results)}\n"
    (chosen.out / "table.md").write_text(told)
    ran = [results[number] for number, _ in numbered]
    print(
        f"{report.summary(ran)}; {time.monotonic() - began:.0f} s in all, "
        f"{fleet.started} servers started; table in {chosen.out / 'table.md'}"
    )
    raise SystemExit(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos-update", description=__doc__)
    parser.add_argument("--part", default="1/1", help="such as 2/4: one of parts of equal length")
    parser.add_argument("--cases", help="numbers of cases, such as 3,17, of all")
    parser.add_argument("--fault", help="only cases of this fault")
    parser.add_argument("--engine", help="only cases of this engine")
    parser.add_argument("--list", action="store_true", help="print the cases, run none")
    parser.add_argument("--verbose", action="store_true", help="tell what trainers were told")
    parser.add_argument("--product", type=Path, help="another checkout whose product is tried")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of results and table")
    return parser.parse_args()


def _chosen(chosen: argparse.Namespace) -> list[tuple[int, Case]]:
    part, parts = map(int, chosen.part.split("/"))
    numbered = part_of(cases(), part, parts)
    if chosen.cases:
        wanted = set(map(int, chosen.cases.split(",")))
        numbered = [each for each in numbered if each[0] in wanted]
    return [
        (number, case)
        for number, case in numbered
        if chosen.fault in (None, case.fault) and chosen.engine in (None, case.engine)
    ]


if __name__ == "__main__":
    main()
