"""`make bench`: the figures of docs/benchmarks.md, as ratios within one run.

Not a test: nothing passes or fails by time. The machine, the wire and the sizes are printed with
every figure, since none means anything without them.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from pathlib import Path

from rich.console import Console

from tests.benchmarks.update_phases import SGLANG_PYTHON, update_phases
from tests.benchmarks.wire_share import wire_share


def main() -> None:
    """Run the benchmarks that were asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["wire", "phases"], help="default: both")
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs (at least 7)")
    chosen = parser.parse_args()
    if chosen.only != "wire" and not SGLANG_PYTHON.exists():
        parser.error(f"{SGLANG_PYTHON} is missing; `make setup-sglang` installs it")
    pairs = max(chosen.pairs, 7)
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    console = Console(width=100)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}; loopback; medians of interleaved runs"
    )
    with tempfile.TemporaryDirectory(prefix="engine-plugins-bench-") as folder:
        if chosen.only in (None, "wire"):
            console.print(wire_share(Path(folder), pairs=pairs))
        if chosen.only in (None, "phases"):
            console.print(update_phases(Path(folder), pairs=pairs))


if __name__ == "__main__":
    main()
