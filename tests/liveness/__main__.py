"""`make liveness`: stuck states made on real engines, and how each of them ends.

Ends with 1 if a trainer was told too late, if /state or the door stayed untrue, if a dead process
left a server behind, an answer was wrong, or anything was left.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos_update.cases import part_of
from tests.liveness import report
from tests.liveness.episode import run_row
from tests.liveness.rows import Row, rows
from tests.liveness.servers import LiveFleet, folder_of_its_own_disk
from tests.liveness.storms import run_storm, storms
from tests.support.environments import ENGINES, in_environment, is_here

OUT = Path("build") / "liveness"


def main() -> None:
    """Run the rows that are asked for, each engine's in its own environment."""
    chosen = _arguments()
    if chosen.engine is None:
        codes = [in_environment("tests.liveness", engine) for engine in ENGINES]
        raise SystemExit(any(codes))
    if not is_here(chosen.engine):
        raise SystemExit(in_environment("tests.liveness"))
    wanted = _chosen(chosen)
    if chosen.list:
        for number, row in wanted:
            print(number, row)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers end, and disks are taken down
    # Before UCX loads, here and in every child: over tcp it would listen on other addresses too.
    os.environ |= {"UCX_NET_DEVICES": "lo", "OMP_NUM_THREADS": "1"}
    raise SystemExit(not _holds(chosen, wanted))


def _holds(chosen: argparse.Namespace, wanted: list[tuple[int, Row]]) -> bool:
    kept, began = chosen.out / "results.jsonl", time.monotonic()
    storms_held: list[bool] = []
    with _places() as (folder, disk):
        fleet = LiveFleet(folder, disk)
        try:
            for number, row in wanted:
                result = run_row(row, fleet, folder)
                report.keep(kept, result)
                print(number, report.line(result), f"{result.took_s:.0f} s", flush=True)
                if not result.holds or chosen.verbose:
                    print("    " + "\n    ".join(result.notes), flush=True)
            for storm in storms(chosen.engine) if chosen.storms else ():
                blown = run_storm(storm, fleet, folder)
                storms_held.append(blown.holds)
                print(report.storm_line(blown), flush=True)
                if not blown.holds:
                    print("    " + "\n    ".join(blown.notes), flush=True)
        finally:
            fleet.close()
    if fleet.stale:
        print(f"the next start left what dead servers had: {sorted(fleet.stale)}")
    results = report.kept(kept)
    if results:
        told = f"{report.table(results.values())}\n\n{report.summary(results.values())}\n"
        (chosen.out / "table.md").write_text(told)
    ran = [results[row] for _, row in wanted]
    print(f"{report.summary(ran)}; {time.monotonic() - began:.0f} s; in {chosen.out}/table.md")
    return all(each.holds for each in ran) and all(storms_held) and not fleet.stale


@contextlib.contextmanager
def _places() -> Iterator[tuple[Path, Path]]:
    """A folder, and one on a small disk of its own."""
    with tempfile.TemporaryDirectory(prefix="liveness-") as temporary:
        folder = Path(temporary)
        with folder_of_its_own_disk(folder / "disk") as disk:
            yield folder, disk


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make liveness", description=__doc__)
    parser.add_argument("--engine", choices=ENGINES, help="only this engine")
    parser.add_argument("--part", default="1/1", help="such as 2/4: one of an engine's parts")
    parser.add_argument("--rows", help="numbers of rows, such as 3,17, of all")
    parser.add_argument("--fault", help="only rows of this stuck state")
    parser.add_argument("--storms", action="store_true", help="updates beside others' calls")
    parser.add_argument("--list", action="store_true", help="print the rows, make none")
    parser.add_argument("--verbose", action="store_true", help="tell what trainers were told")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of results and table")
    return parser.parse_args()


def _chosen(chosen: argparse.Namespace) -> list[tuple[int, Row]]:
    if chosen.storms:
        return []
    part, parts = map(int, chosen.part.split("/"))
    numbered = part_of(rows(chosen.engine), part, parts)
    if chosen.rows:
        wanted = set(map(int, chosen.rows.split(",")))
        numbered = [each for each in numbered if each[0] in wanted]
    return [(number, row) for number, row in numbered if chosen.fault in (None, row.fault)]


if __name__ == "__main__":
    main()
