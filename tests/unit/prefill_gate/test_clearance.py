"""Steps that nobody asks about: granted where there is room for far more, and soon withdrawn."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import pytest

from engine_plugins.prefill_gate.clearance import (
    CLEARED_STEPS,
    LEAST_TOKENS,
    LOOKED_AT_EVERY_S,
    TIMES,
    Clearance,
)
from engine_plugins.prefill_gate.prefill_memory import PrefillMemory
from engine_plugins.prefill_gate.step_shape import NOTHING, Candidate, StepShape
from tests.support.simulated_steps import (
    MIB,
    SimulatedRanks,
    a_memory,
    calibrated,
    measured_memory,
    true_peak,
)

LARGEST = StepShape(tokens=2048, context=2048, pairs=2048 * 2048)
ROWS = 20
ANY = LARGEST.tokens
"""Tokens of a step that may be as large as any."""
STEPS = 7
"""Between two looks."""


@dataclass
class Clock:
    """In place of the machine's."""

    now: float = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    return made


@pytest.fixture
def memory() -> PrefillMemory:
    return measured_memory()


@pytest.fixture
def ranks() -> SimulatedRanks:
    return SimulatedRanks()


@pytest.fixture
def clearance(memory: PrefillMemory, ranks: SimulatedRanks) -> Clearance:
    """Granted, with room for anything."""
    made = Clearance(memory, ranks, LARGEST)
    made.grant(ROWS, ranks.room_bytes)
    return made


def wanted(memory: PrefillMemory, rows: int, tokens: int = ANY) -> float:
    """Bytes for steps up to so many tokens with so many rows, as often as they have to fit."""
    step = LARGEST._replace(tokens=tokens, pairs=tokens * LARGEST.context, rows=rows)
    return TIMES * memory.predict(step).needed_bytes


def test_a_judged_step_clears_those_behind_it_and_no_more(clearance: Clearance) -> None:
    """A step that is judged, and may be measured, comes in between."""
    assert all(clearance.take(ROWS, ANY) for _ in range(CLEARED_STEPS))
    assert not clearance.take(ROWS, ANY)
    assert clearance.steps == CLEARED_STEPS


def test_the_largest_step_has_to_fit_twice(memory: PrefillMemory, ranks: SimulatedRanks) -> None:
    """With a row for each request, and for as many again as may come meanwhile."""
    clearance = Clearance(memory, ranks, LARGEST)
    needed = wanted(memory, 32)
    clearance.grant(ROWS, int(needed) - 1)
    assert not clearance.take(ROWS, ANY)
    clearance.grant(ROWS, int(needed) + 1)
    assert clearance.take(ROWS, ANY)


def test_nearer_to_the_cap_it_clears_smaller_steps(
    memory: PrefillMemory, ranks: SimulatedRanks
) -> None:
    """The most tokens, of halves of the largest step, that would fit twice."""
    clearance = Clearance(memory, ranks, LARGEST)
    clearance.grant(ROWS, int(wanted(memory, 32)) + 1)
    assert not clearance.is_bounded
    for tokens in (ANY // 2, ANY // 4):
        clearance.grant(ROWS, int(wanted(memory, 32, tokens)) + 1)
        assert clearance.is_bounded
        assert not clearance.take(ROWS, tokens + 1)
        assert clearance.take(ROWS, tokens)
    clearance.withdraw()
    assert not clearance.is_bounded
    assert not clearance.take(ROWS, 1)


def test_where_not_even_the_fewest_tokens_fit_twice_all_are_judged(
    memory: PrefillMemory, ranks: SimulatedRanks
) -> None:
    clearance = Clearance(memory, ranks, LARGEST)
    clearance.grant(ROWS, int(wanted(memory, 32, LEAST_TOKENS)) - 1)
    assert not clearance.take(ROWS, 1)
    assert not clearance.is_bounded


def test_steps_as_small_as_what_was_measured_are_cleared(ranks: SimulatedRanks) -> None:
    """Though nobody knows yet what larger ones take."""
    memory = measured_memory()
    clearance = Clearance(memory, ranks, StepShape(tokens=1 << 20, context=2048, pairs=1 << 20))
    clearance.grant(ROWS, 1 << 50)
    assert clearance.is_bounded
    assert not clearance.take(ROWS, 1 << 16)
    assert clearance.take(ROWS, 1 << 10)


def test_a_small_step_attends_to_no_more_than_its_prompts_have(ranks: SimulatedRanks) -> None:
    """Though the largest may attend to the contexts of all requests."""
    memory = measured_memory(per_context_token=1 << 16)
    clearance = Clearance(memory, ranks, LARGEST._replace(context=1 << 20))
    clearance.grant(8, 1 << 40)
    assert clearance.is_bounded
    assert clearance.take(8, 1 << 10)


def test_sizes_that_were_not_measured_clear_nothing(ranks: SimulatedRanks) -> None:
    """Of a few rows of logits nobody knows what twenty take."""
    clearance = Clearance(calibrated(a_memory()), ranks, LARGEST)
    clearance.grant(ROWS, 1 << 40)
    assert not clearance.take(ROWS, ANY)
    clearance.grant(1, 1 << 40)
    assert clearance.take(1, ANY)


def test_what_was_never_measured_clears_nothing(ranks: SimulatedRanks) -> None:
    """However much room there is: an engine that is new learns from each of its steps."""
    clearance = Clearance(a_memory(), ranks, LARGEST)
    clearance.grant(ROWS, 1 << 50)
    assert not clearance.take(ROWS, ANY)


def test_measurements_that_come_later_count(ranks: SimulatedRanks) -> None:
    memory = a_memory()
    clearance = Clearance(memory, ranks, LARGEST)
    clearance.grant(ROWS, 1 << 40)
    assert not clearance.take(ROWS, ANY)
    memory.restore(measured_memory().samples, now=0.0)
    clearance.grant(ROWS, 1 << 40)
    assert clearance.take(ROWS, ANY)
    memory.reset()
    clearance.reset()
    clearance.grant(ROWS, 1 << 40)
    assert not clearance.take(ROWS, ANY)


def test_it_ends_soon_after_others_took_the_memory(
    clearance: Clearance, ranks: SimulatedRanks, clock: Clock
) -> None:
    """And does not come back by itself when they give it back."""
    assert clearance.take(ROWS, ANY)
    ranks.room_bytes = 0
    assert clearance.take(ROWS, ANY)
    clock.now += LOOKED_AT_EVERY_S + 0.01
    assert not clearance.take(ROWS, ANY)
    ranks.room_bytes = 1 << 40
    assert not clearance.take(ROWS, ANY)


def test_as_long_as_a_look_finds_no_room_nothing_is_cleared(
    clearance: Clearance, ranks: SimulatedRanks, clock: Clock
) -> None:
    """Whatever the steps that are judged have read: a rank that cannot look has none."""
    assert clearance.take(ROWS, ANY)
    clock.now += LOOKED_AT_EVERY_S + 0.01
    ranks.room_bytes = -1
    for _ in range(3):
        assert not clearance.take(ROWS, ANY)
        clearance.grant(ROWS, 1 << 40)


def test_ranks_are_not_asked_at_every_step(
    clearance: Clearance, ranks: SimulatedRanks, clock: Clock
) -> None:
    """Ten times in 100 steps here; but after a pause at once: others were awake meanwhile."""
    clearance.take(ROWS, ANY)
    before = ranks.asked
    for _ in range(100):
        clock.now += LOOKED_AT_EVERY_S / 9.9
        clearance.take(ROWS, ANY)
    assert ranks.asked == before + 10
    clock.now += LOOKED_AT_EVERY_S + 0.01
    ranks.room_bytes = 0
    assert not clearance.take(ROWS, ANY)


def test_more_requests_than_were_reckoned_with_are_not_cleared(clearance: Clearance) -> None:
    """Each adds a row of logits; as soon as there are fewer again, the others are."""
    assert clearance.take(32, ANY)
    assert not clearance.take(33, ANY)
    assert clearance.take(32, ANY)


def test_a_change_of_settings_and_a_reset_have_the_next_step_judged(
    clearance: Clearance, ranks: SimulatedRanks, clock: Clock
) -> None:
    clearance.configure(1 * MIB)
    assert not clearance.take(ROWS, ANY)
    clearance.grant(ROWS, ranks.room_bytes)
    clock.now += 1.0
    assert not clearance.take(ROWS, ANY), "it goes by the new cap"
    clearance.grant(ROWS, ranks.room_bytes)
    clearance.reset()
    assert not clearance.take(ROWS, ANY)
    assert clearance.steps == 0


def test_an_engine_whose_ranks_must_agree_is_never_cleared(
    memory: PrefillMemory, ranks: SimulatedRanks
) -> None:
    clearance = Clearance(memory, ranks, None)
    clearance.grant(ROWS, 1 << 40)
    assert not clearance.take(ROWS, ANY)
    assert ranks.asked == 0


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("seed", range(4))
def test_cleared_steps_never_exceed_what_there_is(seed: int, rows: int, clock: Clock) -> None:
    """Ten thousand steps of any size, while others come to take nearly all, and give it back.

    In the time between two looks they take up to a half of what there was.
    """
    chance = random.Random(seed)
    memory = measured_memory()
    least, most = (wanted(memory, 1 << rows.bit_length(), each) for each in (LEAST_TOKENS, ANY))
    ranks = SimulatedRanks()
    clearance = Clearance(memory, ranks, LARGEST)
    cleared, seen, bounded = 0, 0.0, set()
    for number in range(10_000):
        if number % STEPS == 0:
            clock.now += LOOKED_AT_EVERY_S + 0.01
            seen = chance.uniform(*chance.choice(((0, 4 * most), (least, 1.1 * most))))
            ranks.room_bytes = round(seen)
        else:
            ranks.room_bytes = round(seen * chance.uniform(0.5, 1))
        tokens = chance.randint(1, LARGEST.tokens)
        shape = Candidate("x", tokens, tokens).joined_to(
            NOTHING._replace(rows=chance.randint(0, rows - 1)), tokens
        )
        is_bounded = clearance.is_bounded
        if clearance.take(rows, tokens):
            cleared += 1
            bounded |= {tokens} if is_bounded else set()
            assert true_peak(shape, chance) <= ranks.room_bytes
        else:
            clearance.grant(rows, ranks.room_bytes)
    assert 1000 < cleared < 10_000
    assert clearance.steps == cleared
    assert len(bounded) > 30
