"""What an API process refuses from published limits is what the gate would have refused."""

from __future__ import annotations

import time

import msgspec
import pytest

from engine_plugins.errors import MemoryPressureError, PromptTooLargeError
from engine_plugins.prefill_gate.entry import (
    LIMITS_LAST_S,
    EntryKind,
    EntryLimits,
    entry_limits,
    refusal_at_entry,
)
from engine_plugins.prefill_gate.gate import MAX_WAIT_S, PrefillGate
from engine_plugins.prefill_gate.memory_cap import Reading
from engine_plugins.prefill_gate.step_shape import Candidate, StepShape
from engine_plugins.settings import Settings
from tests.support.simulated_steps import MIB, a_memory, calibrated


def _gate(headroom_bytes: int) -> PrefillGate:
    chosen = Settings(prefill_gate="enforce", prefill_margin_bytes=8 * MIB)
    gate = PrefillGate(calibrated(a_memory()), chosen, smallest_chunk=64)
    gate.begin(Reading(0, headroom_bytes), in_flight=False, now=0.0)
    return gate


def _limits(gate: PrefillGate, *, divisible: bool = False) -> EntryLimits:
    limits = entry_limits(
        gate, EntryKind(max_prompt=40_000, divisible=divisible, logprobs_held_bytes=24)
    )
    return msgspec.convert(msgspec.to_builtins(limits), EntryLimits)


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_prompt_that_never_fits_is_refused_before_its_answer_begins(logprobs: bool) -> None:
    """413 with the largest that does; one token less is let in, and runs."""
    gate = _gate(300 * MIB)
    limits = _limits(gate)
    largest = limits.largest_with_logprobs if logprobs else limits.largest_prompt
    assert 64 < largest < 40_000
    assert refusal_at_entry(limits, prompt_tokens=largest, prompt_logprobs=logprobs) is None
    error = refusal_at_entry(limits, prompt_tokens=largest + 1, prompt_logprobs=logprobs)
    assert isinstance(error, PromptTooLargeError)
    assert error.largest_prompt == largest
    candidate = Candidate(
        "x",
        largest,
        largest,
        prompt_logprobs=logprobs,
        held_bytes_per_token=24 if logprobs else 0,
        divisible=False,
    )
    assert gate.decide(candidate).outcome == "run"


def test_an_engine_that_cuts_prompts_takes_them_all() -> None:
    """A chunk at a time."""
    limits = _limits(_gate(300 * MIB), divisible=True)
    assert limits.largest_prompt == limits.largest_with_logprobs == 40_000


def test_while_requests_wait_for_too_long_no_more_are_taken() -> None:
    """503 with a time, from what the scheduler has told."""
    gate = _gate(300 * MIB)
    second = 0
    while gate.longest_wait_s() < MAX_WAIT_S:
        second += 1
        gate.begin(
            Reading(290 * MIB, 300 * MIB),
            running=StepShape(tokens=1, rows=1),
            in_flight=True,
            now=float(second),
        )
        gate.decide(Candidate("one", 500, 500, refusable=False))
    error = refusal_at_entry(_limits(gate, divisible=True), prompt_tokens=5, prompt_logprobs=False)
    assert isinstance(error, MemoryPressureError)
    assert error.retry_after_s >= 1
    gate.forget("one")
    after = _limits(gate, divisible=True)
    assert refusal_at_entry(after, prompt_tokens=5, prompt_logprobs=False) is None


def test_a_new_cap_is_told_at_once_and_old_limits_refuse_nobody() -> None:
    """Nothing latches at the door: an idle engine's memory may have come free since it spoke."""
    gate = _gate(300 * MIB)
    small = Settings(prefill_gate="enforce", prefill_margin_bytes=8 * MIB, prefill_cap_bytes=64)
    gate.configure(small)
    limits = _limits(gate)
    assert limits.largest_prompt == 64, "the smallest chunk"
    refused = refusal_at_entry(limits, prompt_tokens=5000, prompt_logprobs=False)
    assert isinstance(refused, PromptTooLargeError)
    old = msgspec.structs.replace(limits, at=limits.at - LIMITS_LAST_S - 1)
    assert refusal_at_entry(old, prompt_tokens=5000, prompt_logprobs=False) is None
    gate.configure(Settings(prefill_gate="enforce"))
    assert _limits(gate).largest_prompt == 40_000, "what is free is not known before a step"


def test_limits_grow_old_by_a_clock_that_nobody_sets_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step back of the wall clock they would refuse for as long."""
    gate = _gate(300 * MIB)
    gate.configure(Settings(prefill_gate="enforce", prefill_cap_bytes=64))
    limits = _limits(gate)
    assert refusal_at_entry(limits, prompt_tokens=5000, prompt_logprobs=False) is not None
    later = time.monotonic() + LIMITS_LAST_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert refusal_at_entry(limits, prompt_tokens=5000, prompt_logprobs=False) is None
