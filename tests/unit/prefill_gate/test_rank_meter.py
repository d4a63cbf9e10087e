"""What a rank measures around its steps reaches the scheduler, in this process or in another."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine_plugins.prefill_gate import rank_meter
from engine_plugins.prefill_gate.memory_cap import MemoryFigures, Reading
from engine_plugins.prefill_gate.rank_meter import (
    KEPT_PEAKS,
    Measured,
    OwnRank,
    PagedRanks,
    RankMeter,
    StepOrder,
    rank_page,
)
from engine_plugins.shared_page import SharedPage
from tests.support.engine_server import ROOT
from tests.support.measured_layers import MIB, PINNED_ALLOCATOR
from tests.support.waiting import until


class ToldMemory:
    """A rank's memory as a test says it is."""

    def __init__(self, used: int, cap: int, *, peak: int = 0) -> None:
        self.now, self.peak = MemoryFigures(used, cap), peak
        self.calls: list[str] = []
        self.looks = 0

    def look(self) -> None:
        self.looks += 1

    def figures(self) -> MemoryFigures:
        return self.now

    def start(self) -> None:
        self.calls.append("start")

    def peak_bytes(self) -> int:
        return self.peak

    def give_back(self) -> None:
        self.calls.append("give back")


class FailingOnce:
    """A look that finds no memory for itself, the first time."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look, self.failed = look, False

    def __call__(self) -> None:
        if not self.failed:
            self.failed = True
            raise MemoryError
        self._look()


def a_step(meter: RankMeter, number: int, *, measure: bool = True, give_back: bool = False) -> None:
    meter.before(StepOrder(number, measure, give_back))
    meter.after()


def test_orders_are_followed() -> None:
    """Memory is given back before the measurement begins; what is not ordered is not done."""
    memory = ToldMemory(10, 100, peak=7)
    meter = RankMeter(memory)
    a_step(meter, 1, measure=False)
    assert memory.calls == []
    a_step(meter, 2, give_back=True)
    assert memory.calls == ["give back", "start"]
    assert OwnRank(meter).measured() == [Measured(2, 7)]


def test_the_scheduler_of_its_own_process_is_told_each_peak_once() -> None:
    """With memory as it is now, against a configured cap or its own."""
    memory = ToldMemory(10, 100, peak=7)
    meter = RankMeter(memory)
    rank = OwnRank(meter)
    for number in (1, 2):
        a_step(meter, number)
    assert rank.measured() == [Measured(1, 7), Measured(2, 7)]
    assert rank.measured() == []
    assert rank.reading(None) == Reading(10, 100, 90)
    assert rank.reading(50) == Reading(10, 50, 90)
    memory.now = MemoryFigures(60, 100)
    assert rank.reading(None) == Reading(60, 100, 40)


def test_after_without_a_step_does_nothing() -> None:
    """Engines call it for steps of their own too, and twice."""
    memory = ToldMemory(10, 100, peak=7)
    meter = RankMeter(memory)
    meter.after()
    a_step(meter, 1)
    meter.after()
    assert OwnRank(meter).measured() == [Measured(1, 7)]


def test_a_peak_that_nobody_can_say_is_not_told() -> None:
    """The scheduler learns nothing of that step."""
    meter = RankMeter(ToldMemory(10, 100, peak=-1))
    a_step(meter, 1)
    assert OwnRank(meter).measured() == []


def test_peaks_that_nobody_takes_do_not_pile_up() -> None:
    """The newest stay."""
    meter = RankMeter(ToldMemory(10, 100))
    for number in range(100):
        a_step(meter, number)
    assert [each.number for each in OwnRank(meter).measured()] == list(range(100))[-KEPT_PEAKS:]


def test_of_several_ranks_the_tightest_speaks(tmp_path: Path) -> None:
    """The least room, and of each step that all have measured the largest peak."""
    memories = [ToldMemory(10, 100, peak=5), ToldMemory(50, 100, peak=4)]
    pages = [tmp_path / f"{rank}" for rank in range(2)]
    meters = [RankMeter(memory, page) for memory, page in zip(memories, pages, strict=True)]
    ranks = PagedRanks(pages)
    assert ranks.reading(None) == Reading(50, 100, 50)
    assert ranks.measured() == []
    a_step(meters[0], 1)
    assert ranks.measured() == [], "the other rank has not measured it yet"
    memories[1].peak = 9
    a_step(meters[1], 1)
    a_step(meters[1], 2)
    assert ranks.measured() == [Measured(1, 9)]
    assert ranks.measured() == [], "once"
    memories[0].now = MemoryFigures(90, 100)
    a_step(meters[0], 3, measure=False)
    assert ranks.reading(None) == Reading(90, 100, 10)
    assert ranks.reading(95) == Reading(90, 95, 10)


def test_an_idle_rank_keeps_its_page_fresh_and_one_in_a_step_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two chunks a reading would say what the step takes, not what is held."""
    monkeypatch.setattr(rank_meter, "LOOK_S", 0.01)
    memory = ToldMemory(10, 100)
    meter = RankMeter(memory, tmp_path / "page")
    page, ranks = SharedPage(tmp_path / "page"), PagedRanks([tmp_path / "page"])
    memory.now = MemoryFigures(20, 100)
    until(lambda: ranks.reading(None) == Reading(20, 100, 80), otherwise=lambda: page.sequence)
    meter.before(StepOrder(1, True, False))
    memory.now = MemoryFigures(99, 100)
    before = page.sequence
    time.sleep(0.05)
    assert ranks.reading(None) == Reading(20, 100, 80)
    assert page.sequence == before
    meter.after()
    assert ranks.reading(None) == Reading(99, 100, 1)


def test_a_rank_that_is_never_idle_says_what_it_holds_between_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of which nothing is to be done publish nothing, but for one after each look."""
    monkeypatch.setattr(rank_meter, "LOOK_S", 0.01)
    memory = ToldMemory(10, 100)
    meter = RankMeter(memory, tmp_path / "page")
    ranks = PagedRanks([tmp_path / "page"])

    def busy() -> Reading:
        meter.step = "one of which nothing is to be done"
        memory.now = MemoryFigures(99, 100)
        time.sleep(0.02)
        memory.now = MemoryFigures(30, 100)
        meter.step = None
        if meter.is_due:
            meter.after()
        time.sleep(0)
        return ranks.reading(None)

    until(lambda: busy() == Reading(30, 100, 70), otherwise=lambda: "it was never published")
    assert ranks.measured() == []


def test_a_failed_look_is_followed_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may be what is missing when it is looked at."""
    monkeypatch.setattr(rank_meter, "LOOK_S", 0.01)
    memory = ToldMemory(10, 100)
    monkeypatch.setattr(memory, "look", failing := FailingOnce(memory.look))
    meter = RankMeter(memory)
    a_step(meter, 1)
    until(lambda: memory.looks > 1, otherwise=lambda: failing.failed)
    assert failing.failed


def test_a_meter_looks_from_its_first_step_until_nobody_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine whose gate is off has none."""
    monkeypatch.setattr(rank_meter, "LOOK_S", 0.01)
    memory = ToldMemory(10, 100)
    meter = RankMeter(memory)
    time.sleep(0.1)
    assert memory.looks == 0
    a_step(meter, 1)
    until(lambda: memory.looks > 1, otherwise=lambda: "it does not look")
    del meter
    gc.collect()
    time.sleep(0.1)
    before = memory.looks
    time.sleep(0.1)
    assert memory.looks == before


def test_room_is_that_of_the_last_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least of all ranks, against a configured cap or their own, and in addresses."""
    monkeypatch.setattr(rank_meter, "LOOK_S", 0.01)
    memories = [ToldMemory(10, 100), ToldMemory(50, 110)]
    pages = [tmp_path / f"{rank}" for rank in range(2)]
    meters = [RankMeter(memory, page) for memory, page in zip(memories, pages, strict=True)]
    own, all_ranks = OwnRank(meters[1]), PagedRanks(pages)
    assert OwnRank(RankMeter(ToldMemory(0, 9))).room(None) == 9
    assert (own.room(None), own.room(55)) == (60, 5)
    assert (all_ranks.room(None), all_ranks.room(55)) == (60, 5)
    memories[0].now = MemoryFigures(10, 100, 1000, 1007)
    until(lambda: all_ranks.room(None) == 7, otherwise=lambda: all_ranks.room(None))
    assert all_ranks.room(55) == 5
    for meter in meters:
        meter.step = "one that does not end"
    memories[1].now = MemoryFigures(108, 110)
    until(lambda: own.room(None) == all_ranks.room(None) == 2, otherwise=lambda: "within a step")


RANK = """
import sys
from pathlib import Path
from engine_plugins.prefill_gate.rank_meter import RankMeter, StepOrder
from engine_plugins.prefill_gate.step_memory import HostStepMemory
meter = RankMeter(HostStepMemory(ranks=1), Path(sys.argv[1]))
for number, mebibytes in ((7, 32), (8, 8)):
    meter.before(StepOrder(number, True, False))
    block = bytearray(mebibytes << 20)
    block[::4096] = b"x" * len(block[::4096])
    del block
    meter.after()
print("measured", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A rank that has run two steps and waits."""
    page = rank_page(tmp_path, 0)
    page.parent.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(page)],
        cwd=ROOT,
        env={**os.environ, **PINNED_ALLOCATOR},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.communicate("", timeout=60)


def test_a_rank_of_another_process_is_read(
    tmp_path: Path, other_process: subprocess.Popen[str]
) -> None:
    """Its resident memory and its steps' peaks, as the kernel has them."""
    assert other_process.stdout is not None
    assert other_process.stdout.readline() == "measured\n"
    ranks = PagedRanks([rank_page(tmp_path, 0)])
    peaks = dict(ranks.measured())
    assert peaks[7] == pytest.approx(32 * MIB, abs=MIB)
    assert peaks[8] == pytest.approx(8 * MIB, abs=MIB)
    resident = int(Path(f"/proc/{other_process.pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
    assert ranks.reading(None).used_bytes == pytest.approx(resident, abs=4 * MIB)
