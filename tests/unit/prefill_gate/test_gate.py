"""The gate over thousands of simulated steps: nobody dies, nobody starves, nothing latches."""

from __future__ import annotations

import logging
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_plugins.errors import MemoryPressureError, PromptTooLargeError
from engine_plugins.prefill_gate.decision import Decision
from engine_plugins.prefill_gate.gate import MAX_WAIT_S, PrefillGate
from engine_plugins.prefill_gate.gate_report import GateReport
from engine_plugins.prefill_gate.memory_cap import Reading
from engine_plugins.prefill_gate.step_shape import NOTHING, Candidate, StepShape
from engine_plugins.settings import Settings
from tests.support.simulated_steps import (
    MIB,
    EngineDiedError,
    Served,
    a_memory,
    an_engine,
    calibrated,
    true_peak,
)


def _prompt(name: str, tokens: int, **more: bool) -> Candidate:
    return Candidate(name, tokens, tokens, **more)


def _full(tokens: int) -> float:
    return true_peak(_prompt("x", tokens).joined_to(NOTHING, tokens))


def _begun(gate: PrefillGate, headroom: float, *, in_flight: bool = False, now: float = 0) -> None:
    running = StepShape(tokens=1, rows=1) if in_flight else NOTHING
    gate.begin(Reading(0, int(headroom)), running=running, in_flight=in_flight, now=now)


def _gate(mode: str = "enforce") -> PrefillGate:
    chosen = Settings(prefill_gate=mode, prefill_margin_bytes=8 * MIB)
    return PrefillGate(calibrated(a_memory()), chosen, smallest_chunk=64)


def test_what_fits_runs_whole_and_adds_up_in_the_step() -> None:
    """The second prefill of a step finds what the first has taken."""
    gate = _gate()
    _begun(gate, 1.5 * _full(2048))
    assert gate.decide(_prompt("one", 2048)).outcome == "run"
    second = gate.decide(_prompt("two", 2048))
    assert second.outcome == "shrink"
    assert 64 <= second.tokens < 1024
    assert gate.planned.tokens == 2048 + second.tokens
    assert second.peak_bytes + second.margin_bytes <= second.cap_bytes


@given(headroom=st.integers(20, 150))
@settings(max_examples=40, deadline=None)
def test_the_chunk_is_the_largest_that_fits(headroom: int) -> None:
    """By the predictor's own word; 4 % more would not."""
    gate = _gate()
    _begun(gate, headroom * MIB)
    tokens = gate.decide(_prompt("one", 4096)).tokens
    assert gate.planned.tokens == tokens

    def needed(count: int) -> float:
        return gate.memory.predict(_prompt("x", 4096).joined_to(NOTHING, count)).needed_bytes

    assert needed(tokens) <= headroom * MIB < needed(tokens + 2 + tokens // 25)


@pytest.mark.parametrize("headroom", [0, -500 * MIB, 3 * MIB])
def test_an_idle_engine_runs_the_smallest_chunk_whatever_is_predicted(headroom: int) -> None:
    """Memory is reclaimed once before; then waiting would be for nothing."""
    gate = _gate()
    _begun(gate, headroom)
    assert gate.decide(_prompt("one", 1000)).outcome == "reclaim"
    gate.reclaimed()
    _begun(gate, headroom)
    decision = gate.decide(_prompt("one", 1000))
    assert (decision.outcome, decision.tokens) == ("shrink", 64)
    assert gate.decide(_prompt("two", 30)).outcome == "defer", "one at a time"


def test_an_idle_engine_without_any_memory_refuses_for_now_and_latches_nothing() -> None:
    """The smallest chunk would cost the engine. The next request finds what has come free."""
    gate = _gate()
    smallest = a_memory().least_bytes(_prompt("x", 64).joined_to(NOTHING, 64))
    assert 0 < smallest < _full(64)

    def asked(name: str, left: int | None) -> Decision:
        gate.reclaimed()
        gate.begin(Reading(1000 * MIB, 1000 * MIB, left), in_flight=False, now=1.0)
        return gate.decide(_prompt(name, 1000))

    assert asked("one", smallest - 1).outcome == "reclaim", "once, as ever"
    refused = asked("one", smallest - 1)
    assert (refused.outcome, refused.tokens) == ("pressure", 0)
    assert isinstance(refused.error(), MemoryPressureError)
    assert gate.longest_wait_s() == 0
    assert [asked(name, left).tokens for name, left in (("two", smallest), ("three", None))] == [
        64,
        64,
    ], "a configured cap alone, or one that nobody can read, forbids nothing"


def test_what_cannot_be_cut_and_never_fits_is_told_the_largest_that_does() -> None:
    """413 at once, also while others run: waiting is of no use."""
    gate = _gate()
    headroom = 100 * MIB
    _begun(gate, headroom)
    _begun(gate, headroom, in_flight=True)
    refused = gate.decide(_prompt("one", 100_000, divisible=False))
    assert refused.outcome == "too_large"
    error = refused.error()
    assert isinstance(error, PromptTooLargeError)
    largest = error.largest_prompt
    assert str(largest) in error.remedy
    _begun(gate, headroom)
    assert gate.decide(_prompt("two", largest, divisible=False)).outcome == "run"
    _begun(gate, headroom, in_flight=True)
    assert gate.decide(_prompt("three", largest + 1, divisible=False)).outcome == "too_large"


@given(headroom=st.integers(20, 2000), logprobs=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_largest_prompt_is_right_by_the_predictor(headroom: int, logprobs: bool) -> None:
    """Counting up gives the same as the search."""
    gate = _gate()
    _begun(gate, headroom * MIB)
    like = Candidate("x", 4096, 4096, prompt_logprobs=logprobs, divisible=False)
    largest = gate.largest_prompt(like)

    def fits(tokens: int) -> bool:
        alone = like._replace(prompt_tokens=tokens).joined_to(NOTHING, tokens)
        return tokens <= 64 or gate.memory.predict(alone).needed_bytes <= headroom * MIB

    assert fits(largest)
    assert largest == 4096 or not fits(largest + 1)


def test_results_that_stay_count_for_a_prompt_however_it_is_cut() -> None:
    """All logprobs of all words, kept for a long prompt: no chunk is small enough."""
    gate = _gate()
    like = Candidate("x", 512, 10_000, prompt_logprobs=True, held_bytes_per_token=12 * 151_936)
    _begun(gate, 2000 * MIB)
    assert gate.decide(like).outcome == "reclaim"
    decision = gate.decide(like)
    assert decision.outcome == "too_large"
    assert 0 < decision.largest_prompt <= 2000 * MIB // (12 * 151_936)


def test_a_thousand_short_chats_and_an_idle_hour_leave_no_guard_latched() -> None:
    """A peak is behind us, nothing is refused, and a long prompt is judged as at the start."""
    engine = an_engine(headroom_bytes=400 * MIB)
    rng = random.Random(3)
    engine.resting_bytes += 300 * MIB  # a neighbour, for a while
    for number in range(100):
        engine.add(_prompt(f"early {number}", rng.randint(20, 200)), decodes=5)
    engine.run_until_empty()
    engine.resting_bytes -= 300 * MIB
    for number in range(1000):
        engine.add(_prompt(f"chat {number}", rng.randint(20, 200)), decodes=rng.randint(1, 20))
        engine.step()
    engine.run_until_empty()
    refusals = engine.gate.decisions["too_large"] + engine.gate.decisions["pressure"]
    assert refusals == 0
    engine.now += 3600
    short = engine.add(_prompt("short", 163))
    engine.step()
    assert short.outcome == "run"
    large = engine.add(_prompt("long", 2048))
    engine.step()
    assert large.outcome == "run"


def _adversarial(rng: random.Random, number: int) -> Candidate:
    kind = rng.choice(["small", "small", "small", "long", "logprobs", "indivisible"])
    tokens = {
        "small": rng.randint(5, 200),
        "long": rng.randint(2000, 20_000),
        "logprobs": rng.randint(100, 3000),
        "indivisible": rng.randint(1000, 30_000),
    }[kind]
    return Candidate(
        f"{number} {kind}",
        tokens,
        tokens,
        prompt_logprobs=kind == "logprobs",
        held_bytes_per_token=24 if kind == "logprobs" else 0,
        divisible=kind != "indivisible",
    )


@pytest.mark.parametrize(
    ("headroom", "measured", "seed"), [(300, True, 11), (120, False, 3), (300, False, 4)]
)
def test_a_mixture_of_adversaries_never_kills_the_engine_and_every_small_one_is_answered(
    headroom: int, measured: bool, seed: int
) -> None:
    """The simulated engine dies where a step exceeds the cap; only what cannot fit is refused."""
    engine = an_engine(headroom_bytes=headroom * MIB, measured=measured)
    rng = random.Random(seed)
    all_served = []
    for number in range(250):
        served = engine.add(_adversarial(rng, number), decodes=rng.randint(1, 40))
        all_served.append(served)
        if rng.random() < 0.3:
            for _ in range(rng.randint(1, 20)):
                engine.step()
    engine.run_until_empty(3600)
    for served in all_served:
        if "indivisible" in served.candidate.request_id:
            need = engine.resting_bytes + _full(served.candidate.prompt_tokens)
            fits = need < 0.95 * engine.cap_bytes
            assert served.outcome != "too_large" or not fits
        else:
            assert served.outcome == "run", served
    refused = sum(served.outcome == "pressure" for served in all_served)
    assert refused <= 0.005 * len(all_served)


def test_the_same_mixture_kills_an_engine_whose_gate_only_observes() -> None:
    """So that the test above tells something."""
    engine = an_engine(headroom_bytes=300 * MIB, mode="observe")
    rng = random.Random(11)
    for number in range(50):
        engine.add(_adversarial(rng, number))
    with pytest.raises(EngineDiedError):
        engine.run_until_empty()


@pytest.mark.parametrize("itemsize", [2, 8])
def test_a_prior_that_is_far_off_neither_kills_nor_refuses_nor_lasts(itemsize: int) -> None:
    """1.8 times too low, or 2.2 times too high: the engine measures, and then knows better."""
    engine = an_engine(headroom_bytes=120 * MIB, itemsize=itemsize, measured=False)
    for number in range(60):
        engine.add(_prompt(f"{number}", (number % 12 + 1) * 120), decodes=2)
    engine.run_until_empty()
    assert engine.gate.decisions["too_large"] == engine.gate.decisions["pressure"] == 0
    shape = _prompt("x", 1440).joined_to(NOTHING, 1440)
    assert engine.gate.memory.predict(shape).peak_bytes == pytest.approx(true_peak(shape), rel=0.1)


def test_nobody_starves_behind_small_requests_that_keep_coming() -> None:
    """A large one that cannot be cut waits; after a while nobody passes it, and it runs."""
    engine = an_engine(headroom_bytes=100 * MIB)
    rng = random.Random(2)
    large: list[tuple[float, Served]] = []
    for number in range(1500):
        if number % 50 == 0 and sum(s.candidate.request_id == "large" for s in engine.waiting) == 0:
            for busy in range(4):
                engine.add(_prompt(f"busy {number} {busy}", 100), decodes=100)
            large.append((engine.now, engine.add(_prompt("large", 2000, divisible=False))))
        if len(engine.waiting) < 50:
            engine.add(_prompt(f"small {number}", rng.randint(20, 120)), decodes=rng.randint(1, 60))
        engine.step()
    engine.run_until_empty()
    assert {served.outcome for _, served in large} == {"run"}
    assert 2.0 < max(served.done_at - since for since, served in large) < MAX_WAIT_S
    assert engine.gate.deferred_s > 0


def test_one_who_waits_for_long_is_refused_for_now_unless_its_answer_has_begun() -> None:
    """503 with a time to come back after; a stream that has begun goes on waiting."""
    gate = _gate()
    _begun(gate, 400 * MIB)
    stream = _prompt("stream", 4096, divisible=False, refusable=False)
    whole = _prompt("whole", 4096, divisible=False)
    outcomes = []
    now = 1.0
    while now < MAX_WAIT_S + 5:
        _begun(gate, 20 * MIB, in_flight=True, now=now)
        outcomes.append((gate.decide(stream).outcome, gate.decide(whole).outcome))
        if outcomes[-1][1] == "pressure":
            break
        now += 1.0
    streams, wholes = zip(*outcomes, strict=True)
    assert set(streams) <= {"defer", "reclaim"}
    assert set(wholes) == {"defer", "reclaim", "pressure"}
    assert wholes[-1] == "pressure"
    assert wholes.count("reclaim") == 1, "once, for each of them"
    assert streams.count("reclaim") == 1
    _begun(gate, 20 * MIB, in_flight=True, now=now + 1)
    error = gate.decide(_prompt("next", 4096, divisible=False)).error()
    assert error is None
    assert gate.decisions["pressure"] == 1


def test_a_refusal_for_now_says_when_to_come_back() -> None:
    """In whole seconds, at least one."""
    gate = _gate()
    _begun(gate, 400 * MIB)
    refused = None
    for second in range(1, 60):
        _begun(gate, 20 * MIB, in_flight=True, now=second)
        decision = gate.decide(_prompt("one", 4096, divisible=False))
        refused = refused or decision.error()
    assert isinstance(refused, MemoryPressureError)
    assert refused.retry_after_s >= 1
    assert f"{refused.retry_after_s} s" in refused.remedy


def test_who_is_ahead_is_not_passed_for_ever_and_may_vanish() -> None:
    """The first in line holds others back once it has waited; gone without a word, it does not."""
    gate = _gate()
    _begun(gate, 400 * MIB)
    large = _prompt("large", 4096, divisible=False)
    for now, passes in ((1.0, "run"), (2.0, "run"), (3.5, "defer"), (5.0, "defer")):
        _begun(gate, 20 * MIB, in_flight=True, now=now)
        gate.decide(large)
        assert gate.decide(_prompt(f"small {now}", 30)).outcome == passes
    _begun(gate, 20 * MIB, in_flight=True, now=6.0)
    gate.forget("large")
    gate.forget("small 3.5")
    gate.forget("small 5.0")
    assert gate.decide(_prompt("after", 30)).outcome == "run"
    _begun(gate, 20 * MIB, in_flight=True, now=7.0)
    gate.decide(large)
    _begun(gate, 20 * MIB, in_flight=True, now=7.0 + 11)
    assert gate.decide(_prompt("later", 30)).outcome == "run", "nobody asked for it any more"


def test_observing_judges_and_lets_everything_run() -> None:
    """Counters say what would have been."""
    gate = _gate("observe")
    assert gate.is_on
    _begun(gate, 400 * MIB)
    _begun(gate, 12 * MIB, in_flight=True)
    decision = gate.decide(_prompt("one", 4096))
    assert (decision.outcome, decision.judged, decision.tokens) == ("run", "defer", 4096)
    assert decision.error() is None
    assert gate.decisions["defer"] == 1
    assert gate.decide(_prompt("two", 100_000, divisible=False)).judged == "too_large"
    assert not _gate("off").is_on


def test_health_checks_are_let_in_always() -> None:
    """An orchestrator would restart an engine that only has much to do."""
    gate = _gate()
    _begun(gate, -100 * MIB, in_flight=True)
    assert gate.decide(_prompt("health", 8, exempt=True)).outcome == "run"


def test_the_report_says_what_was_decided_and_why() -> None:
    """Plain data: an admin route gives it on."""
    gate = _gate()
    _begun(gate, 400 * MIB)
    _begun(gate, 12 * MIB, in_flight=True)
    for _ in range(3):
        gate.decide(_prompt("one", 4096))
        _begun(gate, 12 * MIB, in_flight=True, now=1.5)
    report = msgspec.json.decode(msgspec.json.encode(gate.report()), type=GateReport)
    assert report == gate.report()
    assert report.decisions["defer"] == 1, "once, however often it is asked for"
    assert (report.waiting, report.longest_wait_s) == (1, 1.5)
    assert (report.settings.mode, report.used_bytes, report.cap_bytes) == ("enforce", 0, 12 * MIB)
    assert report.calibration["layers"].proven


def test_a_step_that_took_more_than_was_predicted_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It ran; what it took is learnt like any other."""
    gate = _gate()
    shape = _prompt("x", 1024).joined_to(NOTHING, 1024)
    with caplog.at_level(logging.WARNING):
        gate.observe(shape, round(_full(1024)), at=0.0)
        assert not caplog.records
        gate.observe(shape, round(_full(1024)) + 9 * MIB, at=0.0)
    assert str(shape) in caplog.text
    assert gate.report().exceeded == 1


@given(headroom=st.integers(100, 4000), tokens=st.integers(1, 8000), logprobs=st.booleans())
@settings(max_examples=100, deadline=None)
def test_an_idle_engine_refuses_nothing_that_stays_below_95_percent_of_the_cap(
    headroom: int, tokens: int, logprobs: bool
) -> None:
    """And lets nothing in that exceeds it, up to 8 times the 1024 tokens that were measured."""
    engine = an_engine(headroom_bytes=headroom * MIB)
    like = Candidate("x", tokens, tokens, prompt_logprobs=logprobs, divisible=False)
    need = engine.resting_bytes + true_peak(like.joined_to(NOTHING, tokens))
    served = engine.add(like)
    if need <= 0.95 * engine.cap_bytes:
        engine.step()
        assert served.outcome == "run"
    elif tokens > 64:
        for _ in range(2):
            engine.step()  # which would die
        assert served.outcome in ("run", "too_large")
        assert need <= engine.cap_bytes or served.outcome == "too_large"


def test_new_settings_hold_from_the_next_step_and_a_reset_forgets_all() -> None:
    """As PATCH and POST reset do."""
    gate = _gate()
    _begun(gate, 400 * MIB, in_flight=True)
    one = _prompt("one", 2048)
    assert gate.decide(one).outcome == "run"
    gate.configure(Settings(prefill_gate="enforce", prefill_margin_bytes=300 * MIB))
    _begun(gate, 360 * MIB, in_flight=True)
    assert gate.decide(one).outcome == "shrink"
    gate.configure(Settings(prefill_gate="observe", prefill_margin_bytes=300 * MIB))
    _begun(gate, 360 * MIB, in_flight=True)
    assert gate.decide(one).outcome == "run"
    gate.reset()
    assert not any(gate.decisions.values())
    assert not any(gate.memory.samples.values())
