"""What it costs to ask what a rank holds, and how soon after its memory rests there is an answer.

NVML is the tests' fake, so the figures are those of our own part: the bindings, the proof that pids
are ours, and the processes that are looked up in /proc. A driver's own time comes on top. What
nvidia-smi would cost at the least is one start of a program that does nothing.
"""

from __future__ import annotations

import mmap
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from engine_plugins.sleep.rank_memory import RankMemory
from tests.support.fake_nvml import Scene, build_nvml, run_scenes

PROBES = 50
LIMIT_MS = 10.0
RELEASED_BYTES = 256 << 20


def memory_probe(*, runs: int) -> Table:
    """A table of probes, and of settling after a release of host memory."""
    table = Table(
        title=f"One probe: ms, of {PROBES} (limit {LIMIT_MS:.0f}); start of a program = 1"
    )
    for column in ("asked", "median", "slowest", "x start of a program"):
        table.add_column(column, justify="right" if column != "asked" else "left")
    asked = {
        "host memory (CPU platform)": _milliseconds(RankMemory(0, None).sample),
        **_under_nvml(),
    }
    start = statistics.median(_milliseconds(lambda: subprocess.run(["true"], check=True)))
    for name, times in asked.items():
        median = statistics.median(times)
        table.add_row(name, f"{median:.2f}", f"{max(times):.2f}", f"{median / start:.2f}")
    table.add_row("start of a program", f"{start:.2f}", "", "1")
    settle = [_settle_s() * 1e3 for _ in range(runs)]
    table.add_row(
        "answer after a release (limit 300)",
        f"{statistics.median(settle):.0f}",
        f"{max(settle):.0f}",
    )
    return table


def one_rank_alone(scene: Scene) -> list[float]:
    scene.process(os.getpid(), 1 << 30)
    return _milliseconds(scene.memory().sample)


def among_seven_others_with_eight_children(scene: Scene) -> list[float]:
    """As where several engines and a trainer share the GPU, and the rank has helpers."""
    scene.process(os.getpid(), 1 << 30)
    for _ in range(8):
        scene.process(scene.child(), 1 << 30)
    for _ in range(7):
        scene.process(os.getppid(), 1 << 30)
    return _milliseconds(scene.memory().sample)


def not_told(scene: Scene) -> list[float]:
    """Every source is asked, as none is exact."""
    scene.process(os.getpid(), 0)
    return _milliseconds(scene.memory(allocator_bytes=lambda: 1 << 30).sample)


def as_they_are(times: list[float]) -> list[float]:
    return times


def _under_nvml() -> dict[str, list[float]]:
    scenes = {
        "NVML, one process": one_rank_alone,
        "NVML, 16 processes, 9 of them the rank's": among_seven_others_with_eight_children,
        "NVML says 0: all sources": not_told,
    }
    with tempfile.TemporaryDirectory(prefix="engine-plugins-bench-") as folder:
        library = build_nvml(Path(folder))
        names = [each.__name__ for each in scenes.values()]
        answers = run_scenes(as_they_are, names, library=library, namespace=False)
    return {name: answers[scene.__name__] for name, scene in scenes.items()}


def _milliseconds(probe: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(PROBES):
        began = time.perf_counter()
        probe()
        times.append((time.perf_counter() - began) * 1e3)
    return times


def _settle_s() -> float:
    """Seconds from the release of pages to the answer."""
    pages = mmap.mmap(
        -1, RELEASED_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    )
    memory = RankMemory(0, None)
    pages.madvise(mmap.MADV_DONTNEED)
    began = time.perf_counter()
    result = memory.settled()
    seconds = time.perf_counter() - began
    pages.close()
    assert result.settled
    return seconds
