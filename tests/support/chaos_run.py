"""`make chaos-gate`: thousands of hostile requests against an engine that may not grow.

Prints what became of each kind, and ends with 1 if anything of what must hold did not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import LinearRegression

from rich.console import Console
from rich.table import Table

from tests.support.besieged import ROOM_BYTES, Judgement, Siege, besieged, judged, measured_line
from tests.support.chaos import Outcome, mixture, sent
from tests.support.engine_server import ROOT
from tests.support.engines import SGLANG, VLLM, Engine
from tests.support.gate_models import QUICK
from tests.support.sglang_server import sglang_server

__all__ = ["attack", "faults"]

SGLANG_PYTHON = ROOT / ".venv" / "sglang" / "bin" / "python"
CLIENTS = 8
LONGEST = 3000


def main() -> None:
    """Attack both engines, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="of each engine")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    console = Console(width=100)
    failed = False
    sglang = replace(SGLANG, serve=partial(sglang_server, python=SGLANG_PYTHON))
    for engine in (VLLM, sglang):
        with tempfile.TemporaryDirectory(prefix="engine-plugins-chaos-") as folder:
            began = time.monotonic()
            with besieged(engine, Path(folder), mode="enforce", model=QUICK) as siege:
                siege.calibrate()
                needs = measured_line(siege.gate())
                judgement, _ = attack(siege, needs, requests=chosen.requests, seed=chosen.seed)
                alive = siege.lives()
            console.print(_table(engine, judgement, time.monotonic() - began))
        found = faults(judgement, chosen.requests, alive=alive)
        console.print(*found or ["held"], sep="\n")
        failed = failed or bool(found)
    raise SystemExit(failed)


def attack(
    siege: Siege, needs: LinearRegression, *, requests: int, seed: int
) -> tuple[Judgement, list[Outcome]]:
    """Attack a server under a limit of its addresses; what has shown.

    Args:
        siege: calibrated.
        needs: bytes over tokens of a prompt with all its logits, as it was measured.
        requests: in all, of every kind.
        seed: of the mixture.
    """
    siege.limit_addresses()
    siege.wait_until_seen()
    attacks = mixture(requests, seed=seed, vocab=siege.model.vocab, longest=LONGEST)
    outcomes = sent(siege.server, attacks, clients=CLIENTS)
    return judged(outcomes, needs=needs, room_bytes=ROOM_BYTES), outcomes


def _table(engine: Engine, judgement: Judgement, took_s: float) -> Table:
    table = Table(title=f"{engine.kind}: what became of them ({took_s:.0f} s)")
    table.add_column("kind")
    table.add_column("ends")
    for kind, ends in judgement.table.items():
        table.add_row(kind, ", ".join(f"{count} {end}" for end, count in sorted(ends.items())))
    return table


def faults(judgement: Judgement, requests: int, *, alive: bool) -> list[str]:
    """What did not hold, in words."""
    found = {
        "the engine died": not alive,
        f"{judgement.unanswered_small} small requests without their answer": (
            judgement.unanswered_small
        ),
        f"{judgement.false_refusals} refused that would have fitted": (
            judgement.false_refusals > 0.005 * requests
        ),
        f"{judgement.broken} broken off after a 200": judgement.broken,
        f"{judgement.lost} lost": judgement.lost,
        f"{judgement.untold} refusals that do not say what to do": judgement.untold,
    }
    return [fault for fault, is_so in found.items() if is_so]


if __name__ == "__main__":
    main()
