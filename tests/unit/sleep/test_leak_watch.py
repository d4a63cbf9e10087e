"""A leak of 64 MiB per cycle is found; noise, spikes and one lasting step are none."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from engine_plugins.sleep.leak_watch import WINDOW_CYCLES, LeakTrend, LeakWatch
from engine_plugins.sleep.memory_report import MemorySample, RankMemoryRow, ResidualReport
from engine_plugins.sleep.residual_memory import assess
from tests.support.memory_rows import GIB, exact, row, unknown

MIB = 1 << 20
PROJECT = Path(__file__).parents[3]


def report(*samples: MemorySample, kept_bytes: int = 0) -> ResidualReport:
    rows = [
        row(sample, tp_rank=rank, gpu=f"GPU-{rank}", kept_bytes=kept_bytes)
        for rank, sample in enumerate(samples)
    ]
    return assess(
        rows,
        policy="observe",
        threshold_bytes=64 * GIB,
        over_baseline_bytes=64 * GIB,
        measured_at=0.0,
    )


def trends(figures: Iterable[float | None]) -> list[LeakTrend]:
    """The trend after each cycle, of bytes that one device held."""
    watch, found = LeakWatch(), []
    for nbytes in figures:
        watch = watch.after(report(unknown() if nbytes is None else exact(nbytes / GIB)))
        found += watch.trends()
    return found


def noisy(cycles: int, seed: int, *, leak: float = 0.0) -> list[float]:
    """2 GiB, give or take what settling tolerates, and now and then a neighbour's GiB."""
    source = random.Random(seed)
    return [
        2 * GIB + source.gauss(0, 64 * MIB) + (GIB if source.random() < 0.02 else 0) + cycle * leak
        for cycle in range(cycles)
    ]


def test_a_thousand_noisy_cycles_trip_nothing() -> None:
    seen = trends(noisy(1000, seed=7))
    assert len(seen) == 1000
    assert [each.cycles for each in seen if each.leaking] == []


@pytest.mark.parametrize("seed", range(10))
def test_a_leak_of_64_mib_per_cycle_is_found_under_the_same_noise(seed: int) -> None:
    """Within two windows, and its slope is told."""
    seen = trends(noisy(2 * WINDOW_CYCLES, seed, leak=64 * MIB))
    assert any(each.leaking for each in seen)
    assert seen[-1].slope_bytes == pytest.approx(64 * MIB, rel=0.4)


def test_a_quiet_leak_is_found_as_soon_as_there_is_a_window() -> None:
    seen = trends(GIB + cycle * 64 * MIB for cycle in range(WINDOW_CYCLES))
    assert [each.leaking for each in seen] == [False] * (WINDOW_CYCLES - 1) + [True]
    assert seen[-1].slope_bytes == pytest.approx(64 * MIB, rel=0.01)


@pytest.mark.parametrize("at", range(2 * WINDOW_CYCLES))
def test_one_lasting_step_is_no_leak_wherever_it_falls(at: int) -> None:
    """Kernels that are loaded late stay; they come once."""
    figures = [GIB + (2 * GIB if cycle >= at else 0) for cycle in range(3 * WINDOW_CYCLES)]
    assert not any(each.leaking for each in trends(figures))


def test_growth_that_comes_to_rest_is_no_leak_any_more() -> None:
    figures = [GIB + min(cycle, 20) * 64 * MIB for cycle in range(60)]
    seen = trends(figures)
    assert any(each.leaking for each in seen)
    assert not seen[-1].leaking
    assert seen[-1].slope_bytes == 0


def test_cycles_that_were_not_measured_are_gaps_and_not_zeros() -> None:
    """Every third figure is missing; the slope is still one of cycles."""
    figures = [
        None if cycle % 3 == 2 else GIB + cycle * 64 * MIB for cycle in range(2 * WINDOW_CYCLES)
    ]
    last = trends(figures)[-1]
    assert last.leaking
    assert last.slope_bytes == pytest.approx(64 * MIB, rel=0.01)
    assert trends([None] * 30) == []


def test_each_device_has_a_trend_of_its_own() -> None:
    watch = LeakWatch()
    for cycle in range(WINDOW_CYCLES):
        watch = watch.after(report(exact(1), exact(1 + cycle / 8)))
    assert [(each.device, each.leaking) for each in watch.trends()] == [
        ("GPU-0", False),
        ("GPU-1", True),
    ]


def test_what_is_kept_by_design_is_no_growth() -> None:
    """More tags stay mapped from cycle to cycle because they were asked to."""
    watch = LeakWatch()
    for cycle in range(WINDOW_CYCLES):
        watch = watch.after(report(exact(1 + cycle / 8), kept_bytes=cycle * GIB // 8))
    assert [each.leaking for each in watch.trends()] == [False]


def test_the_watch_is_kept_as_json_and_does_not_grow() -> None:
    watch, sizes = LeakWatch(), []
    for _ in range(100):
        watch = msgspec.json.decode(
            msgspec.json.encode(watch.after(report(exact(1)))), type=LeakWatch
        )
        sizes.append(len(msgspec.json.encode(watch)))
    assert watch.cycle == 100
    assert watch.trends()[0].cycles == WINDOW_CYCLES
    assert sizes[-1] <= sizes[20] + WINDOW_CYCLES


LEAKING_WORKER = """
import mmap, sys
from engine_plugins.sleep.rank_memory import RankMemory
import msgspec
memory = RankMemory(0, None)
memory.take_baseline()
held = []
for line in sys.stdin:
    if length := int(line):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        held.append(mmap.mmap(-1, length, flags=flags))
    print(msgspec.json.encode(memory.row(memory.sample())).decode(), flush=True)
"""


@pytest.mark.parametrize("leak", [0, 64 * MIB])
def test_a_real_process_that_keeps_64_mib_of_each_cycle_is_found_out(leak: int) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", LEAKING_WORKER],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    watch = LeakWatch()
    for _ in range(WINDOW_CYCLES):
        worker.stdin.write(f"{leak}\n")
        worker.stdin.flush()
        said = msgspec.json.decode(worker.stdout.readline(), type=RankMemoryRow)
        watch = watch.after(
            assess(
                [said],
                policy="enforce",
                threshold_bytes=GIB,
                over_baseline_bytes=GIB,
                measured_at=0.0,
            )
        )
    worker.communicate()
    (trend,) = watch.trends()
    assert trend.leaking == bool(leak)
    assert trend.slope_bytes == pytest.approx(leak, abs=2 * MIB)
