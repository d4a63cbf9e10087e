"""`make soak`: hundreds of updates and sleeps under load, and what grows with each.

Ends with 1 if a process grows by 8 KiB per update or sleep beyond what the same load alone makes
of it, or if descriptors, threads or files grow at all.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.chaos_update.fleet import Fleet
from tests.chaos_update.models import Models
from tests.soak import runs
from tests.soak.report import Slope, slopes, table
from tests.soak.servers import SoakFleet
from tests.support.environments import ENGINES, in_environment, is_here

OUT = Path("build") / "soak"


def main() -> None:
    """Soak the engines that are asked for, each in its own environment."""
    chosen = _arguments()
    if chosen.engine is None:
        codes = [in_environment("tests.soak", engine) for engine in ENGINES]
        raise SystemExit(any(codes))
    if not is_here(chosen.engine):
        raise SystemExit(in_environment("tests.soak"))
    # Before UCX loads, here and in every child: over tcp it would listen on other addresses too.
    os.environ |= {"UCX_NET_DEVICES": "lo", "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = Path(temporary)
        fleet = SoakFleet(Models(folder / "models", layers=2), folder)
        try:
            found = _soaked(chosen, fleet, folder)
        finally:
            fleet.close()
    chosen.out.mkdir(parents=True, exist_ok=True)
    told = table(found)
    (chosen.out / f"{chosen.engine}.md").write_text(told + "\n")
    failed = [slope for _, slope in found if not slope.holds]
    print(f"{told}\n{len(failed)} of {len(found)} too steep; {time.monotonic() - began:.0f} s")
    raise SystemExit(bool(failed))


def _soaked(chosen: argparse.Namespace, fleet: Fleet, folder: Path) -> list[tuple[str, Slope]]:
    """Updates and sleeps on one server, the control on another; the slopes of both runs."""
    kind, found = runs.kind_of(chosen.engine), dict[str, runs.Run]()
    target = fleet.target(kind)
    if chosen.updates:
        found["updates"] = runs.updates(target, fleet.models, folder, steps=chosen.updates)
    if chosen.sleeps:
        found["sleeps"] = runs.sleeps(target, steps=chosen.sleeps)
    fleet.close()
    busiest = max(found.values(), key=lambda run: run.requests)
    control = runs.alone(fleet.target(kind), steps=len(busiest.held) - 1, requests=busiest.requests)
    for name, run in {**found, "alone": control}.items():
        print(
            f"{chosen.engine} {name}: {len(run.held) - 1} steps in {run.took_s:.0f} s, "
            f"{run.requests} requests, {run.broken} broken",
            flush=True,
        )
        file = chosen.out / f"{chosen.engine}-{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([asdict(held) for held in run.held]))
    return [
        (f"{chosen.engine}, {name}", slope)
        for name, run in found.items()
        for slope in slopes(run, control)
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--engine", choices=ENGINES, help="only this engine")
    parser.add_argument("--updates", type=int, default=300, help="updates under load")
    parser.add_argument("--sleeps", type=int, default=100, help="sleeps and wakes under load")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of samples and table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
