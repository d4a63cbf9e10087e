"""An answer comes soon after memory stands still, and not before."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from engine_plugins.sleep.memory_report import MemorySample, Settled
from engine_plugins.sleep.settling import settled
from tests.support.memory_rows import GIB, exact, unknown

MIB = 1 << 20


class Machine:
    """Memory as a function of time, on a clock that only probes and naps move.

    Args:
        held: bytes at a time, or `None` where they are not known.
        probe_s: what a probe takes.
    """

    def __init__(self, held: Callable[[float], float | None], probe_s: float = 0.002) -> None:
        self.now = 0.0
        self._held, self._probe_s = held, probe_s

    def settle(self, deadline_s: float = 5.0) -> Settled:
        return settled(
            self.sample, deadline_s=deadline_s, monotonic=lambda: self.now, sleep=self.pass_time
        )

    def sample(self) -> MemorySample:
        self.pass_time(self._probe_s)
        held = self._held(self.now)
        return unknown() if held is None else exact(held / GIB)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


def test_memory_that_stands_still_is_seen_to_within_300_ms() -> None:
    machine = Machine(lambda now: 2 * GIB)
    result = machine.settle()
    assert (result.settled, result.sample.resident_bytes) == (True, 2 * GIB)
    assert result.seconds == machine.now <= 0.3


@pytest.mark.parametrize("probe_s", [0.0001, 0.002, 0.01])
@pytest.mark.parametrize("falls_for_s", [0.0, 0.13, 0.2, 0.71, 1.0, 3.3])
def test_the_answer_comes_within_300_ms_of_memory_being_stable(
    falls_for_s: float, probe_s: float
) -> None:
    """It falls by 8 GiB a second, then stands; noise within the tolerance is no movement."""

    def held(now: float) -> float:
        noise = 20 * MIB if int(now * 1000) % 2 else 0
        return GIB + max(falls_for_s - now, 0.0) * 8 * GIB + noise

    machine = Machine(held, probe_s)
    result = machine.settle()
    assert result.settled
    assert falls_for_s - 0.01 <= machine.now <= falls_for_s + 0.3
    assert result.sample.resident_bytes is not None
    assert result.sample.resident_bytes <= GIB + 84 * MIB


@pytest.mark.parametrize("held", [2 * GIB, 100 * GIB])
def test_slow_release_is_not_taken_for_rest(held: int) -> None:
    """48 MiB from one poll to the next lie within any tolerance, and go on all the same."""
    machine = Machine(lambda now: held + max(2.0 - now, 0.0) * 960 * MIB)
    assert machine.settle().settled
    assert 1.9 <= machine.now <= 2.3


def test_the_growth_of_a_few_pages_is_no_movement() -> None:
    """Probing itself takes some."""
    assert Machine(lambda now: GIB + now * MIB).settle().settled


def test_the_tolerance_grows_with_what_is_held() -> None:
    """2 % of 40 GiB is 800 MiB: a neighbour's scratch memory under the same figure."""
    machine = Machine(lambda now: 40 * GIB + (int(now * 100) % 2) * 500 * MIB)
    assert machine.settle().settled
    smaller = Machine(lambda now: 4 * GIB + (int(now * 20) % 2) * 500 * MIB)
    assert not smaller.settle().settled


def test_memory_that_never_rests_ends_at_the_deadline() -> None:
    machine = Machine(lambda now: 20 * GIB - now * 2 * GIB)
    result = machine.settle(deadline_s=2.0)
    assert not result.settled
    assert 1.9 <= machine.now <= 2.0
    assert result.sample.resident_bytes == pytest.approx(16 * GIB, rel=0.01)


def test_time_that_probes_take_counts_towards_the_deadline() -> None:
    machine = Machine(lambda now: 20 * GIB - now * 2 * GIB, probe_s=0.9)
    result = machine.settle(deadline_s=2.0)
    assert not result.settled
    assert result.samples == 3
    assert machine.now <= 2.0 + 0.9


def test_one_probe_is_never_an_answer() -> None:
    """Even one that takes longer than the window."""
    machine = Machine(lambda now: 8 * GIB if now < 0.5 else GIB, probe_s=0.4)
    result = machine.settle()
    assert result.samples >= 3
    assert result.sample.resident_bytes == GIB


def test_a_figure_that_comes_late_is_waited_for() -> None:
    """Unknown and known in one window are no agreement."""
    machine = Machine(lambda now: None if now < 0.12 else GIB)
    result = machine.settle()
    assert (result.settled, result.sample.resident_bytes) == (True, GIB)
    assert machine.now <= 0.12 + 0.3


def test_what_stays_unknown_for_one_reason_does_not_wait_for_the_deadline() -> None:
    machine = Machine(lambda now: None)
    result = machine.settle()
    assert (result.sample.resident_bytes, result.sample.reason) == (None, "zero_bytes")
    assert machine.now <= 0.3


def test_it_travels() -> None:
    result = Machine(lambda now: GIB).settle()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=Settled) == result
