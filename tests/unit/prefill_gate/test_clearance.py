"""Steps that nobody asks about: granted where there is room for far more, and soon withdrawn."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import pytest

from engine_plugins.prefill_gate.clearance import (
    CLEARED_STEPS,
    LOOKED_AT_EVERY,
    STOOD_STILL_S,
    TIMES,
    Clearance,
)
from engine_plugins.prefill_gate.memory_cap import Reading
from engine_plugins.prefill_gate.prefill_memory import PrefillMemory
from engine_plugins.prefill_gate.rank_meter import Measured
from engine_plugins.prefill_gate.step_shape import NOTHING, Candidate, StepShape
from tests.support.simulated_steps import MIB, a_memory, calibrated, true_peak

LARGEST = StepShape(tokens=2048, context=2048, pairs=2048 * 2048)
ROWS = 20


@dataclass
class Ranks:
    """Ranks whose room a test sets, and which say how often they were asked for it."""

    room_bytes: int = 1 << 40
    asked: int = 0

    def device_bytes(self) -> int | None:
        return None

    def room(self, configured_cap: int | None) -> int:
        self.asked += 1
        return self.room_bytes if configured_cap is None else configured_cap

    def reading(self, configured_cap: int | None) -> Reading:
        return Reading(0, self.room_bytes)

    def measured(self) -> list[Measured]:
        return []


def measured_memory() -> PrefillMemory:
    """That has measured prompts up to a half of the largest step, and up to 16 decodes at once."""
    memory = calibrated(a_memory())
    for rows in (1, 4, 16):
        shape = StepShape(tokens=rows, rows=rows)
        for _ in range(3):
            memory.observe(shape, true_peak(shape), at=0.0)
    return memory


@pytest.fixture
def memory() -> PrefillMemory:
    return measured_memory()


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


@pytest.fixture
def clearance(memory: PrefillMemory, ranks: Ranks) -> Clearance:
    """Granted, with room for anything."""
    made = Clearance(memory, ranks, LARGEST)
    made.grant(ROWS, ranks.room_bytes)
    return made


def wanted(memory: PrefillMemory, rows: int) -> float:
    """Bytes for the largest step with so many rows, as often as it has to fit."""
    return TIMES * memory.predict(LARGEST._replace(rows=rows)).needed_bytes


def test_a_judged_step_clears_those_behind_it_and_no_more(clearance: Clearance) -> None:
    """A step that is judged, and may be measured, comes in between."""
    assert all(clearance.take(ROWS) for _ in range(CLEARED_STEPS))
    assert not clearance.take(ROWS)
    assert clearance.steps == CLEARED_STEPS


def test_the_largest_step_has_to_fit_twice(memory: PrefillMemory, ranks: Ranks) -> None:
    """With a row for each request, and for as many again as may come meanwhile."""
    clearance = Clearance(memory, ranks, LARGEST)
    needed = wanted(memory, 32)
    clearance.grant(ROWS, int(needed) - 1)
    assert not clearance.take(ROWS)
    clearance.grant(ROWS, int(needed) + 1)
    assert clearance.take(ROWS)


def test_sizes_that_were_not_measured_clear_nothing(ranks: Ranks) -> None:
    """Of a few rows of logits nobody knows what twenty take."""
    clearance = Clearance(calibrated(a_memory()), ranks, LARGEST)
    clearance.grant(ROWS, 1 << 40)
    assert not clearance.take(ROWS)
    clearance.grant(1, 1 << 40)
    assert clearance.take(1)


def test_what_was_never_measured_clears_nothing(ranks: Ranks) -> None:
    """However much room there is: an engine that is new learns from each of its steps."""
    clearance = Clearance(a_memory(), ranks, LARGEST)
    clearance.grant(ROWS, 1 << 50)
    assert not clearance.take(ROWS)


def test_measurements_that_come_later_count(ranks: Ranks) -> None:
    memory = a_memory()
    clearance = Clearance(memory, ranks, LARGEST)
    clearance.grant(ROWS, 1 << 40)
    assert not clearance.take(ROWS)
    memory.restore(measured_memory().samples, now=0.0)
    clearance.grant(ROWS, 1 << 40)
    assert clearance.take(ROWS)
    memory.reset()
    clearance.reset()
    clearance.grant(ROWS, 1 << 40)
    assert not clearance.take(ROWS)


def test_it_ends_soon_after_others_took_the_memory(clearance: Clearance, ranks: Ranks) -> None:
    """And does not come back by itself when they give it back."""
    assert clearance.take(ROWS)
    ranks.room_bytes = 0
    taken = [clearance.take(ROWS) for _ in range(2 * LOOKED_AT_EVERY)]
    assert sum(taken) < LOOKED_AT_EVERY
    ranks.room_bytes = 1 << 40
    assert not clearance.take(ROWS)


def test_ranks_are_not_asked_at_every_step(
    clearance: Clearance, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the first step of an engine that stood still, whose memory others may have taken."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clearance.take(ROWS)
    before = ranks.asked
    for _ in range(10 * LOOKED_AT_EVERY):
        now += 0.02
        clearance.take(ROWS)
    assert ranks.asked == before + 10
    now += STOOD_STILL_S + 0.1
    ranks.room_bytes = 0
    assert not clearance.take(ROWS)


def test_more_requests_than_were_reckoned_with_are_not_cleared(clearance: Clearance) -> None:
    """Each adds a row of logits; as soon as there are fewer again, the others are."""
    assert clearance.take(32)
    assert not clearance.take(33)
    assert clearance.take(32)


def test_a_change_of_settings_and_a_reset_have_the_next_step_judged(
    clearance: Clearance, ranks: Ranks
) -> None:
    clearance.configure(1 * MIB)
    assert not clearance.take(ROWS)
    clearance.grant(ROWS, ranks.room_bytes)
    taken = [clearance.take(ROWS) for _ in range(LOOKED_AT_EVERY)]
    assert not all(taken), "it goes by the new cap"
    clearance.grant(ROWS, ranks.room_bytes)
    clearance.reset()
    assert not clearance.take(ROWS)
    assert clearance.steps == 0


def test_an_engine_whose_ranks_must_agree_is_never_cleared(
    memory: PrefillMemory, ranks: Ranks
) -> None:
    clearance = Clearance(memory, ranks, None)
    clearance.grant(ROWS, 1 << 40)
    assert not clearance.take(ROWS)
    assert ranks.asked == 0


@pytest.mark.parametrize("seed", range(4))
def test_cleared_steps_never_exceed_what_there_is(seed: int) -> None:
    """Ten thousand steps of any size, while others come to take nearly all, and give it back.

    In the time between two looks they take at most what one such step needs.
    """
    chance = random.Random(seed)
    memory = measured_memory()
    largest = memory.predict(LARGEST._replace(rows=32)).needed_bytes
    most = 6 * largest
    ranks = Ranks(round(most))
    clearance = Clearance(memory, ranks, LARGEST)
    cleared = 0
    for _ in range(10_000):
        step = chance.uniform(-1, 1) * largest / LOOKED_AT_EVERY
        ranks.room_bytes = round(min(max(ranks.room_bytes + step, 0), most))
        tokens = chance.randint(1, LARGEST.tokens)
        shape = Candidate("x", tokens, tokens).joined_to(
            NOTHING._replace(rows=chance.randint(1, ROWS)), tokens
        )
        if clearance.take(ROWS):
            cleared += 1
            assert true_peak(shape, chance) <= ranks.room_bytes
        else:
            clearance.grant(ROWS, ranks.room_bytes)
    assert 1000 < cleared < 10_000
    assert clearance.steps == cleared
