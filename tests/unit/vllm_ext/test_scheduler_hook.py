"""The gate in front of vLLM's own scheduler; what the model would compute is made up."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason

from engine_plugins.errors import MemoryPressureError, PromptTooLargeError
from engine_plugins.prefill_gate.engine_gate import StepFigures
from engine_plugins.prefill_gate.gate import MAX_WAIT_S
from engine_plugins.prefill_gate.memory_cap import Reading
from engine_plugins.prefill_gate.rank_meter import Measured
from engine_plugins.prefill_gate.step_shape import NOTHING, Candidate, StepShape
from tests.support.scheduled_vllm import BLOCK, ScheduledVllm, scheduled_vllm
from vllm_ext.prefill_refusal import refusal_of
from vllm_ext.scheduler_hook import FEW_WAITING, LOOKED_AT_ONE_IN, MAX_LOST
from vllm_ext.step_order import NOTHING_TO_DO, order_of

MIB = 1 << 20
TOKEN = 3 * 4096 * 4 + 2 * 1024 * 4
"""Bytes of a token by the prior, of the sizes below."""
DELTA = RequestOutputKind.DELTA


@dataclass
class Ranks:
    """Ranks with as much room as a test says, on its clock."""

    room_bytes: int = 1 << 40
    now: float = field(default_factory=time.monotonic)
    done: list[Measured] = field(default_factory=list)

    def device_bytes(self) -> int | None:
        return None

    def reading(self, configured_cap: int | None) -> Reading:
        return Reading(0, self.room_bytes)

    def room(self, configured_cap: int | None) -> int:
        return self.room_bytes

    def measured(self) -> list[Measured]:
        return self.done


@dataclass
class Engine(ScheduledVllm):
    """A scheduler whose ranks and clock a test sets."""

    ranks: Ranks = field(default_factory=Ranks)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    return _engine(tmp_path, monkeypatch, mode="enforce")


def _engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, mode: str, **arguments: Any
) -> Engine:
    ranks = Ranks()
    made = scheduled_vllm(folder, ranks, mode=mode, **arguments)

    def figures() -> StepFigures:
        return StepFigures(ranks.reading(None), ranks.now, ranks.now, ranks.measured())

    monkeypatch.setattr(made.gate, "figures", figures)
    return Engine(**vars(made), ranks=ranks)


def _calibrate(engine: Engine) -> None:
    """Its gate has measured prompts and decodes of all sizes; what it measured is the prior."""
    memory = engine.gate.gate.memory
    for tokens in (1, 4, 16, 64, 256, 1024):
        prompt = Candidate("x", tokens, tokens).joined_to(NOTHING, tokens)
        for shape in (prompt, StepShape(tokens=tokens, rows=tokens)):
            for _ in range(3):
                memory.observe(shape, memory.least_bytes(shape) + MIB, at=engine.ranks.now)


def _in_flight(engine: Engine) -> None:
    """Somebody decodes, and the step after this one is cleared."""
    _calibrate(engine)
    engine.add("decoding", range(5000, 5040), max_tokens=50)
    engine.step()
    cleared = engine.gate.report().cleared_steps
    engine.step()
    assert engine.gate.report().cleared_steps == cleared + 1


def _room_for(tokens: int) -> int:
    """Bytes that a gate which has measured nothing wants for so many tokens: twice the prior."""
    return 2 * TOKEN * tokens + 4 * MIB


def test_with_room_for_all_the_engine_does_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step for step, of prompts longer and shorter than a step and one that others begin like."""
    steps = []
    for mode in ("off", "observe", "enforce"):
        (tmp_path / mode).mkdir()
        engine = _engine(tmp_path / mode, monkeypatch, mode=mode)
        engine.add("long", range(1500))
        engine.add("short", range(9, 40))
        steps.append([engine.step() for _ in range(3)])
        engine.add("like", range(1200))
        steps[-1] += [engine.step() for _ in range(6)]
        assert engine.said("long") == engine.said("like") == [7] * 4
    assert steps[0] == steps[1] == steps[2]
    assert steps[0][3]["like"] == 1200 - 1200 // BLOCK * BLOCK + BLOCK


def test_cleared_steps_are_not_asked_about_and_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those of an idle engine."""
    engines: dict[str, Engine] = {}
    steps = {}
    for mode in ("off", "enforce"):
        (tmp_path / mode).mkdir()
        engine = engines[mode] = _engine(tmp_path / mode, monkeypatch, mode=mode)
        _calibrate(engine)
        for name in ("first", "second"):
            engine.add(name, range(40))
        steps[mode] = [engine.step()]
        engine.add("long", range(1500))
        engine.add("short", range(9, 40))
        steps[mode] += [engine.step() for _ in range(3)]
        assert (order_of(engine.last) == NOTHING_TO_DO) == (mode == "enforce")
        engine.add("like", range(1200))
        steps[mode] += [engine.step() for _ in range(6)]
        assert engine.said("long") == engine.said("like") == [7] * 4
    assert steps["off"] == steps["enforce"]
    engine = engines["enforce"]
    assert not engine.scheduler.requests
    report = engine.gate.report()
    assert report.decisions["run"] == 2
    assert report.cleared_steps == 7, "all others but two that were empty"
    engine.add("to an idle engine", range(30))
    engine.step()
    assert engine.gate.report().decisions["run"] == 3


class Asked:
    """Clears nothing, and counts how often it was asked."""

    times = 0

    def __call__(self, rows: int, tokens: int) -> bool:
        self.times += 1
        return False


def test_behind_a_cleared_step_others_are_cleared_until_somebody_comes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, without a call; and they end with what was granted."""
    _in_flight(engine)
    cleared = engine.gate.clearance.steps
    engine.gate.clearance.looked_until = math.inf
    monkeypatch.setattr(engine.gate.clearance, "take", asked := Asked())
    for _ in range(9):
        engine.step()
    assert (engine.gate.clearance.steps, asked.times) == (cleared + 9, 0)
    engine.add("next", range(100))
    engine.step()
    assert (engine.gate.clearance.steps, asked.times) == (cleared + 9, 1)


def test_behind_a_cleared_step_room_is_looked_at_when_it_is_time(engine: Engine) -> None:
    _in_flight(engine)
    engine.step()
    assert engine.gate.clearance.left
    engine.ranks.room_bytes = 0
    engine.gate.clearance.looked_until = 0.0
    engine.step()
    assert not engine.gate.clearance.left


@pytest.mark.parametrize("holds_kv", [False, True])
def test_who_waits_again_near_the_cap_is_judged_by_all_its_tokens(
    engine: Engine, holds_kv: bool
) -> None:
    """It had been one that decodes, and small steps were cleared."""
    _calibrate(engine)
    long = engine.add("long", range(900), max_tokens=50)
    engine.add("decoding", range(5000, 5040), max_tokens=50)
    engine.step()
    engine.ranks.room_bytes = _room_for(500)
    engine.gate.clearance.withdraw()
    cleared = engine.gate.clearance.steps
    for _ in range(LOOKED_AT_ONE_IN + 3):
        engine.step()
    assert engine.gate.clearance.is_bounded
    assert engine.gate.clearance.steps > cleared + 1
    engine.scheduler.running.remove(long)
    engine.scheduler._preempt_request(long, 0.0)
    if holds_kv:  # as of a session that goes on
        engine.scheduler.waiting.remove_request(long)
        engine.scheduler.kv_holding_waiting.add_request(long)
    judged = sum(engine.gate.gate.decisions.values())
    engine.step()
    assert sum(engine.gate.gate.decisions.values()) == judged + 1


def test_who_asks_for_more_than_tokens_is_judged_all_the_same(engine: Engine) -> None:
    """As is whoever comes with it, until it has ended."""
    _in_flight(engine)
    engine.add("scored", range(200), prompt_logprobs=1, max_tokens=2)
    engine.add("plain", range(300, 330))
    engine.step()
    assert engine.gate.report().decisions["run"] == 3
    while "scored" in engine.scheduler.requests:
        engine.step()
    before = engine.gate.report().cleared_steps
    engine.add("after", range(400, 430))
    engine.step()
    assert engine.gate.report().cleared_steps == before + 1
    assert engine.gate.report().decisions["run"] == 3


def test_where_memory_becomes_scarce_prefills_are_judged_again(engine: Engine) -> None:
    """As soon as it is seen: there was room for anything when they were cleared."""
    _in_flight(engine)
    engine.ranks.room_bytes = _room_for(40)
    engine.gate.clearance.looked_until = 0.0
    engine.add("cut", range(900))
    assert 0 < engine.step()["cut"] < 200
    assert engine.gate.report().decisions["shrink"] == 1


def test_nearer_to_the_cap_small_steps_run_unasked_and_larger_are_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tokens of all that may join a step; where many wait they are not counted."""
    engine = _engine(tmp_path, monkeypatch, mode="enforce", places=64)
    _calibrate(engine)
    engine.ranks.room_bytes = 2 * (256 * TOKEN + 8 * MIB)
    numbers, decoding = count(100), 20
    for number in range(decoding):
        engine.add(f"decoding {number}", range(5000, 5002), max_tokens=50)
    engine.step()

    def judged(*prompts: int) -> int:
        before = engine.gate.report()
        for number, tokens in enumerate(prompts):
            start = 100 * next(numbers)
            engine.add(f"{start} {number}", range(start, start + tokens), max_tokens=1)
        assert sum(engine.step().values()) == sum(prompts) + decoding
        after = engine.gate.report()
        judged = after.decisions["run"] - before.decisions["run"]
        assert after.cleared_steps - before.cleared_steps == (judged == 0)
        return judged

    assert judged(200) == 0
    assert judged(100, 100) == 0
    assert judged(300) == 1
    assert judged(150, 150) == 2
    assert judged(200) == 0
    assert judged(*[20] * FEW_WAITING) == 0
    assert judged(*[20] * (FEW_WAITING + 1)) == FEW_WAITING + 1
    assert judged() == 0


def test_the_rest_of_a_prompt_counts_as_much_as_one_that_waits(engine: Engine) -> None:
    """Small steps are cleared, and the long prompt's chunks are not among them."""
    _calibrate(engine)
    engine.ranks.room_bytes = 2 * (256 * TOKEN + 8 * MIB)
    engine.add("decoding", range(5000, 5040), max_tokens=50)
    engine.step()
    engine.add("long", range(2000))
    chunks: list[int] = []
    while sum(chunks) < 2000:
        judged = sum(engine.gate.gate.decisions.values())
        chunks.append(engine.step()["long"])
        assert sum(engine.gate.gate.decisions.values()) == judged + (chunks[-1] + 1 > 256)
    assert max(chunks) < 1000


@pytest.mark.parametrize("unseen", ["off", "cleared"])
def test_a_prompt_that_was_begun_unseen_is_judged_in_the_end(engine: Engine, unseen: str) -> None:
    """Though before that everything only decoded."""
    _in_flight(engine)
    engine.gate.clearance.withdraw()
    engine.step()
    for _ in range(LOOKED_AT_ONE_IN):
        engine.step()
    if unseen == "off":
        engine.gate.configure({"mode": "off"})
    engine.add("long", range(3000))
    assert engine.step()["long"] > 1000
    engine.ranks.room_bytes = _room_for(40)
    engine.gate.configure({"mode": "enforce"})
    assert engine.step()["long"] < 200
    assert engine.gate.report().decisions["shrink"] == 1


@pytest.mark.parametrize("cleared", [False, True])
def test_kv_that_could_not_be_loaded_is_a_prompt_again(engine: Engine, cleared: bool) -> None:
    """Though the request has decoded since, and small steps were cleared."""
    if cleared:
        _calibrate(engine)
    engine.add("long", range(800), max_tokens=50)
    engine.step()
    if cleared:
        engine.ranks.room_bytes = _room_for(300)
    for _ in range(LOOKED_AT_ONE_IN):
        engine.step()
    assert engine.gate.clearance.is_bounded is cleared
    (blocks,) = engine.scheduler.kv_cache_manager.get_block_ids("long")
    said = engine.said("long")
    assert engine.step(not_loaded=blocks) == {"long": 1}
    engine.ranks.room_bytes = _room_for(120)
    assert 0 < engine.step()["long"] < 400
    assert engine.gate.report().decisions["shrink"] == 1
    engine.ranks.room_bytes = 1 << 40
    while engine.step() != {"long": 1}:
        pass
    assert engine.said("long")[: len(said) + 1] == [7] * (len(said) + 1)


def test_a_lost_step_that_was_cleared_is_computed_again(engine: Engine) -> None:
    """Without its largest prompt, and with the rest of what it computed; then all are judged."""
    _in_flight(engine)
    engine.add("largest", range(1000, 1600))
    engine.add("small", range(300, 330))
    assert engine.step(lost=True) == {"decoding": 1, "largest": 600, "small": 30}
    assert isinstance(refusal_of(engine.end("largest").stop_reason), MemoryPressureError)
    judged = engine.gate.report().decisions["run"]
    assert engine.step() == {"decoding": 1, "small": 30}
    assert engine.gate.report().decisions["run"] > judged
    for _ in range(3):
        engine.step()
    assert engine.said("small") == [7] * 4


def test_off_puts_nothing_on_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine(tmp_path, monkeypatch, mode="off")
    engine.add("one", range(100))
    engine.step()
    assert order_of(engine.last) is None
    assert sum(engine.gate.gate.decisions.values()) == 0


def test_a_chunk_is_cut_to_the_room_that_there_is(engine: Engine) -> None:
    """From the first to the last, and the same tokens are said."""
    engine.ranks.room_bytes = _room_for(200)
    engine.add("long", range(900))
    chunks = [engine.step()["long"] for _ in range(7)]
    assert sum(chunks[:5]) >= 900 - 64
    assert all(180 <= each <= 200 for each in chunks[:4])
    while not any(each.finish_reason for each in engine.outputs):
        engine.step()
    assert engine.said("long") == [7] * 4
    order = order_of(engine.last)
    assert order is not None


def test_a_small_prompt_passes_one_that_waits_and_order_is_kept(engine: Engine) -> None:
    """While another decodes, what has no room waits in its place; the small one runs."""
    engine.add("decoding", range(40))
    engine.step()
    engine.ranks.room_bytes = _room_for(40)
    engine.add("waits", range(900))
    engine.add("waits_too", range(1000, 1900))
    engine.add("small", range(2000, 2020))
    ran = engine.step()
    assert ran.keys() == {"decoding", "small"}
    assert [each.request_id for each in engine.scheduler.waiting] == ["waits", "waits_too"]
    engine.ranks.room_bytes = 1 << 40
    steps = [engine.step().keys() for _ in range(10)]
    assert steps[3].isdisjoint({"decoding", "small"}), "an idle engine forgets what it read"
    assert steps[3] == {"waits", "waits_too"}
    assert engine.said("waits") == engine.said("waits_too") == [7] * 4


def test_what_never_fits_ends_with_the_largest_prompt_that_does(engine: Engine) -> None:
    """Logits of a prompt are kept to the end: there is no cutting those."""
    engine.ranks.room_bytes = 20_000
    engine.add("plain", range(50))
    engine.add("logprobs", range(2000), prompt_logprobs=1)
    while len([each for each in engine.outputs if each.finish_reason]) < 2:
        engine.step()
    assert engine.said("plain") == [7] * 4
    end = engine.end("logprobs")
    assert end.finish_reason == FinishReason.ERROR
    refusal = refusal_of(end.stop_reason)
    assert isinstance(refusal, PromptTooLargeError)
    assert refusal.largest_prompt == 1000
    assert not engine.scheduler.requests


def test_who_waits_for_too_long_is_refused_for_now_unless_its_answer_may_have_begun(
    engine: Engine,
) -> None:
    engine.add("decoding", range(40), min_tokens=1)
    engine.step()
    engine.ranks.room_bytes = _room_for(20)
    engine.add("waits", range(600))
    engine.add("stream", range(700, 1300), output_kind=DELTA)
    engine.add("held", range(1400, 2000), output_kind=DELTA, held=True)
    running = engine.scheduler.requests["decoding"]
    running.max_tokens = 10_000
    for _ in range(8):
        engine.ranks.now += MAX_WAIT_S / 6
        engine.step()
    for name in ("waits", "held"):
        refusal = refusal_of(engine.end(name).stop_reason)
        assert isinstance(refusal, MemoryPressureError)
        assert refusal.retry_after_s >= 1
    assert [each.request_id for each in engine.scheduler.waiting] == ["stream"]
    status = engine.board.read()
    assert status is not None
    assert status.limits.waiting_s >= MAX_WAIT_S
    for name in ("stream", "decoding"):
        engine.scheduler.finish_requests(name, running.status.FINISHED_ABORTED)
    status = engine.board.read()
    assert status is not None
    assert status.limits.waiting_s == 0


def test_a_held_stream_that_has_spoken_is_not_refused(engine: Engine) -> None:
    """Its prompt may have to be computed again: it waits for that as long as it takes."""
    engine.add("decoding", range(40), min_tokens=1)
    engine.add("stream", range(700, 1300), output_kind=DELTA, held=True)
    engine.step()
    assert engine.said("stream") == [7]
    running = engine.scheduler.requests["decoding"]
    running.max_tokens = 10_000
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.ranks.room_bytes = _room_for(20)
    for _ in range(12):
        engine.ranks.now += MAX_WAIT_S / 6
        engine.step()
    assert "stream" in engine.scheduler.requests
    assert engine.gate.gate.longest_wait_s() > MAX_WAIT_S
    engine.ranks.room_bytes = 1 << 40
    engine.gate.gate.reclaimed()
    for _ in range(8):
        engine.step()
    assert engine.said("stream") == [7] * 4


def test_memory_is_given_back_before_anything_is_refused(engine: Engine) -> None:
    """An order without tokens reaches the ranks, and the request is asked about again."""
    engine.ranks.room_bytes = -1
    engine.add("one", range(100), prompt_logprobs=1)
    assert engine.step() == {}
    order = order_of(engine.last)
    assert order
    assert order.step.give_back
    engine.ranks.room_bytes = 1 << 40
    assert engine.step() == {"one": 100}


def test_a_lost_step_is_computed_again_without_what_needed_most(engine: Engine) -> None:
    """Those that decode, and small prompts, say what they would have said; nothing is reused."""
    engine.add("decoding", range(40))
    engine.step()
    engine.add("largest", range(1000, 1600))
    engine.add("small", range(300, 330))
    before = engine.gate.gate.exceeded
    assert engine.step(lost=True) == {"decoding": 1, "largest": 600, "small": 30}
    refusal = refusal_of(engine.end("largest").stop_reason)
    assert isinstance(refusal, MemoryPressureError)
    assert engine.gate.gate.exceeded == before + 1
    assert engine.step() == {"decoding": 1, "small": 30}
    engine.add("like", range(1000, 1600))
    assert engine.step()["like"] == 600
    for _ in range(4):
        engine.step()
    assert engine.said("decoding") == engine.said("small") == engine.said("like") == [7] * 4
    assert not engine.scheduler.requests


def test_an_engine_that_loses_every_step_ends(engine: Engine) -> None:
    engine.add("decoding", range(40))
    engine.step()
    for _ in range(MAX_LOST):
        engine.step(lost=True)
    with pytest.raises(MemoryError, match="in a row"):
        engine.step(lost=True)
