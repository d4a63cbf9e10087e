"""The reading to go by: the highest of late, and nothing of old."""

from __future__ import annotations

from engine_plugins.prefill_gate.high_water import WINDOW, HighWater
from engine_plugins.prefill_gate.memory_cap import Reading


def test_a_trough_between_two_chunks_does_not_count() -> None:
    """The highest reading of late is what the next chunk comes on top of."""
    water = HighWater()
    for used, counts in ((10, 10), (70, 70), (20, 70), (71, 71), (10, 71)):
        assert water.read(Reading(used, 100), in_flight=True).used_bytes == counts


def test_a_peak_is_forgotten_with_its_window_and_by_an_idle_engine_at_once() -> None:
    """So that no guard can latch."""
    water = HighWater()
    water.read(Reading(90, 100), in_flight=True)
    readings = [water.read(Reading(10, 100), in_flight=True) for _ in range(2 * WINDOW)]
    assert readings[WINDOW - 2].used_bytes == 90
    assert readings[-1].used_bytes == 10
    water.read(Reading(90, 100), in_flight=True)
    assert water.read(Reading(10, 100), in_flight=False).used_bytes == 10
    assert water.read(Reading(11, 100), in_flight=True).used_bytes == 11


def test_the_latest_reading_of_an_idle_engine_is_kept() -> None:
    """The first of all stands for it until the engine was idle once."""
    water = HighWater()
    water.read(Reading(50, 100), in_flight=True)
    water.read(Reading(80, 100), in_flight=True)
    assert water.idle == Reading(50, 100)
    water.read(Reading(40, 100), in_flight=False)
    water.read(Reading(60, 100), in_flight=False)
    water.read(Reading(95, 100), in_flight=True)
    assert water.idle == Reading(60, 100)


def test_memory_that_was_given_back_counts_at_once() -> None:
    """Otherwise a reclaim would show after a window."""
    water = HighWater()
    water.read(Reading(90, 100), in_flight=True)
    water.forget()
    assert water.read(Reading(30, 100), in_flight=True).used_bytes == 30


def test_a_cap_that_shrinks_counts_as_use_that_grows() -> None:
    """What is compared is the room that is left."""
    water = HighWater()
    water.read(Reading(50, 100), in_flight=True)
    assert water.read(Reading(50, 60), in_flight=True) == Reading(50, 60)
