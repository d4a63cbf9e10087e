"""`make bench`: the figures of docs/benchmarks.md, as ratios within one run.

Not a test: nothing passes or fails by time. The machine, the wire and the sizes are printed with
every figure, since none means anything without them.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from tests.benchmarks.cast_cost import cast_cost
from tests.benchmarks.event_loop import event_loop
from tests.benchmarks.gate_cost import gate_cost
from tests.benchmarks.gate_error import gate_error
from tests.benchmarks.gate_steps import gate_steps
from tests.benchmarks.gate_throughput import gate_throughput
from tests.benchmarks.held_pull import held_pull
from tests.benchmarks.memory_probe import memory_probe
from tests.benchmarks.pause_beside_copy import pause_beside_copy
from tests.benchmarks.peaks import peaks
from tests.benchmarks.plan_scale import plan_scale, plan_sources
from tests.benchmarks.publishing import publishing
from tests.benchmarks.push_beside_pull import push_beside_pull
from tests.benchmarks.refresh import refresh
from tests.benchmarks.row_cost import row_cost
from tests.benchmarks.trainer_cost import trainer_cost
from tests.benchmarks.update_phases import SGLANG_PYTHON, update_phases
from tests.support.cpu_features import cpu_line
from tests.support.engine_server import ROOT

MEGATRON_PYTHON = ROOT / ".venv" / "megatron" / "bin" / "python"
"""What we are compared with has pins of its own, so those benchmarks run in its environment."""
BESIDE_OTHERS = {
    "wire": "tests.benchmarks.wire_share",
    "megatron": "tests.benchmarks.megatron_export",
}
"""Modules that print their own table there."""


def main() -> None:
    """Run the benchmarks that were asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        choices=[
            *BESIDE_OTHERS,
            "push",
            "publish",
            "rows",
            "cast",
            "kernels",
            "probe",
            "gate",
            "refresh",
            "trainer",
            "plan",
            "phases",
            "peaks",
            "held-pull",
            "pause",
            "gate-steps",
            "gate-error",
            "gate-throughput",
        ],
        help="default: all",
    )
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs (at least 7)")
    chosen = parser.parse_args()
    for python in (SGLANG_PYTHON, MEGATRON_PYTHON):
        if not python.exists():
            parser.error(f"{python} is missing; `make setup-{python.parts[-3]}` installs it")
    pairs = max(chosen.pairs, 7)
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    console = Console(width=100)
    console.print(
        f"{cpu_line()}; {platform.machine()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}; loopback; medians of interleaved runs"
    )
    for name, module in BESIDE_OTHERS.items():
        if chosen.only in (None, name):
            command = [str(MEGATRON_PYTHON), "-m", module, "--pairs", str(pairs)]
            subprocess.run(command, cwd=ROOT, check=True)
    if chosen.only in (None, "push"):
        console.print(push_beside_pull(pairs=pairs))
    if chosen.only in (None, "publish"):
        console.print(publishing(runs=pairs))
    if chosen.only in (None, "rows"):
        console.print(row_cost(pairs=pairs))
    if chosen.only in (None, "cast"):
        console.print(cast_cost(pairs=pairs))
    if chosen.only in (None, "kernels"):
        subprocess.run([sys.executable, "-m", "tests.benchmarks.kernel_bandwidth"], cwd=ROOT)
    if chosen.only in (None, "probe"):
        console.print(memory_probe(runs=pairs))
    if chosen.only in (None, "gate"):
        console.print(gate_cost())
    if chosen.only in (None, "refresh"):
        console.print(refresh(runs=pairs))
    if chosen.only in (None, "plan"):
        wide = Console(width=180)
        wide.print(plan_sources(runs=pairs))
        wide.print(plan_scale(SGLANG_PYTHON, runs=pairs))
        wide.print(event_loop())
    with tempfile.TemporaryDirectory(prefix="engine-plugins-bench-") as folder:
        if chosen.only in (None, "phases"):
            console.print(update_phases(Path(folder), pairs=pairs))
        if chosen.only in (None, "trainer"):
            console.print(trainer_cost(Path(folder)))
        if chosen.only in (None, "peaks"):
            console.print(peaks(Path(folder), SGLANG_PYTHON))
        if chosen.only in (None, "held-pull"):
            console.print(held_pull(Path(folder), SGLANG_PYTHON, pairs=pairs))
        if chosen.only in (None, "pause"):
            console.print(pause_beside_copy(Path(folder), SGLANG_PYTHON, pairs=pairs))
        if chosen.only in (None, "gate-steps"):
            console.print(gate_steps(Path(folder), SGLANG_PYTHON))
        if chosen.only in (None, "gate-error"):
            console.print(gate_error(Path(folder), SGLANG_PYTHON))
        if chosen.only in (None, "gate-throughput"):
            console.print(gate_throughput(Path(folder), SGLANG_PYTHON, pairs=4 * pairs))


if __name__ == "__main__":
    main()
