"""Steps of an SGLang scheduler that the gate is not asked about, by the queue in front of them."""

from __future__ import annotations

from array import array
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from engine_plugins.prefill_gate.clearance import TIMES, Clearance
from engine_plugins.prefill_gate.step_shape import StepShape
from sglang_ext.unasked_steps import FEW_WAITING, LOOKED_AT_ONE_IN, UnaskedSteps
from tests.support.simulated_steps import SimulatedRanks, measured_memory

NUMBERS = count()
LARGEST = StepShape(tokens=2048, context=2048, pairs=2048 * 2048)
ROWS = 4
SMALLER = StepShape(tokens=1024, context=1024, pairs=1024 * 2048, rows=2 * ROWS)
"""With the rows that a clearance reckons with."""
PLENTY = 1 << 40


def request(tokens: int, *, said: int = 0, logprobs: bool = False) -> Req:
    """A request that SGLang has taken in."""
    made = Req(
        rid=str(next(NUMBERS)),
        origin_input_text="",
        origin_input_ids=array("q", range(tokens)),
        sampling_params=SamplingParams(max_new_tokens=4),
        return_logprob=logprobs,
    )
    made.output_ids.extend(range(said))
    return made


def queue(*waiting: Req, chunked: Req | None = None, compiling: bool = False) -> Any:
    """The fields of a scheduler that say who waits."""
    return SimpleNamespace(
        waiting_queue=list(waiting),
        chunked_req=chunked,
        max_running_requests=ROWS,
        is_mixed_chunk=False,
        grammar_manager=SimpleNamespace(grammar_queue=[object()] if compiling else []),
    )


def running(decodes: int) -> Any:
    """The field of a batch that says how many decode."""
    return SimpleNamespace(reqs=[None] * decodes)


def steps(largest: StepShape | None, room_bytes: float = PLENTY) -> UnaskedSteps:
    """After a step that was judged, with so much room."""
    clearance = Clearance(measured_memory(), SimulatedRanks(), largest)
    clearance.grant(ROWS, int(room_bytes))
    return UnaskedSteps(clearance)


@pytest.fixture
def unasked() -> UnaskedSteps:
    return steps(LARGEST)


def test_prefills_run_unasked_beside_others_and_to_an_idle_engine_asked(
    unasked: UnaskedSteps,
) -> None:
    scheduler = queue(*(request(1000) for _ in range(2 * FEW_WAITING)), chunked=request(9000))
    assert not unasked.begin(scheduler, running(0))
    assert not unasked.goes_on
    assert unasked.begin(scheduler, running(3))
    assert unasked.goes_on


def test_what_may_become_ready_at_any_time_is_asked_about(unasked: UnaskedSteps) -> None:
    """A request whose grammar is being compiled joined nothing that could be looked at."""
    assert not unasked.begin(queue(compiling=True), running(3))


def test_who_asks_for_more_than_tokens_is_asked_about_until_it_has_left_the_queue(
    unasked: UnaskedSteps,
) -> None:
    scored = request(10, logprobs=True)
    unasked.note(queue(), scored)
    assert not unasked.begin(queue(scored, request(10)), running(3))
    assert not unasked.begin(queue(chunked=scored), running(3))
    assert unasked.begin(queue(request(10)), running(3))
    assert unasked.begin(queue(scored), running(3)), "nobody waits for it any more"


def test_where_only_small_steps_are_cleared_all_that_wait_are_counted() -> None:
    """With what they had said before they were taken back, and those that decode beside them."""
    most = SMALLER.tokens
    unasked = steps(LARGEST, 1 + TIMES * measured_memory().predict(SMALLER).needed_bytes)
    assert unasked.begin(queue(request(most - 3)), running(3))
    assert not unasked.begin(queue(request(most)), running(3))
    assert not unasked.begin(queue(request(most - 10), request(10)), running(3))
    assert not unasked.begin(queue(request(most - 10, said=10)), running(3))
    assert not unasked.begin(queue(request(10), chunked=request(most - 10)), running(3))
    assert unasked.begin(queue(*(request(1) for _ in range(FEW_WAITING))), running(3))
    assert not unasked.begin(queue(*(request(1) for _ in range(FEW_WAITING + 1))), running(3))


def test_prompts_that_decodes_would_join_are_asked_about_near_the_cap() -> None:
    """A decode attends to more than its one token."""
    scheduler = queue(request(1))
    unasked = steps(LARGEST, 1 + TIMES * measured_memory().predict(SMALLER).needed_bytes)
    assert unasked.begin(scheduler, running(3))
    scheduler.is_mixed_chunk = True
    assert not unasked.begin(scheduler, running(3))
    assert unasked.begin(queue(), running(3))


def test_with_nothing_cleared_one_step_of_a_few_that_only_decode_is_asked_about() -> None:
    unasked = steps(None)
    decoding = [unasked.begin(queue(), running(3)) for _ in range(2 * LOOKED_AT_ONE_IN)]
    assert decoding.count(False) == 2
    assert not unasked.begin(queue(request(10)), running(3))
