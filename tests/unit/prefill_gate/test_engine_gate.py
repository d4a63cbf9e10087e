"""What a scheduler drives: equal figures, equal decisions; and what becomes of what it measures."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from engine_plugins.admin.shared_state import create_runtime_dir
from engine_plugins.errors import SettingsError
from engine_plugins.prefill_gate import engine_gate
from engine_plugins.prefill_gate.calibration_file import CalibrationKey
from engine_plugins.prefill_gate.engine_gate import (
    SHOWN_STEPS,
    EngineGate,
    Keep,
    StepFigures,
    calibration_file,
    make_engine_gate,
    require_cap,
)
from engine_plugins.prefill_gate.entry import EntryKind, GateBoard
from engine_plugins.prefill_gate.fitted_line import Sample
from engine_plugins.prefill_gate.memory_cap import Reading
from engine_plugins.prefill_gate.model_memory import ModelMemory, Regime
from engine_plugins.prefill_gate.rank_meter import Measured
from engine_plugins.prefill_gate.step_shape import NOTHING, Candidate, StepShape
from engine_plugins.settings import Settings
from tests.support.simulated_steps import MIB, SIZES, a_memory, calibrated, true_peak

ENFORCED = Settings(prefill_gate="enforce", prefill_margin_bytes=8 * MIB)


class ToldRanks:
    """Ranks that say what a test has them say."""

    def __init__(self, reading: Reading) -> None:
        self.now = reading
        self.peaks: list[Measured] = []

    def device_bytes(self) -> int | None:
        return None

    def reading(self, configured_cap: int | None) -> Reading:
        if configured_cap is None:
            return self.now
        return Reading(self.now.used_bytes, configured_cap)

    def room(self, configured_cap: int | None) -> int:
        return self.reading(configured_cap).headroom_bytes

    def measured(self) -> list[Measured]:
        return self.peaks


class SilentRanks:
    """Of a scheduler that is handed another rank's figures."""

    def device_bytes(self) -> int | None:
        return None

    def reading(self, configured_cap: int | None) -> Reading:
        raise AssertionError("asked for a reading")

    def room(self, configured_cap: int | None) -> int:
        raise AssertionError("asked for room")

    def measured(self) -> list[Measured]:
        raise AssertionError("asked for peaks")


def a_gate(
    ranks: ToldRanks | SilentRanks,
    settings: Settings = ENFORCED,
    *,
    board: GateBoard | None = None,
    keep: Keep | None = None,
    samples: Mapping[Regime, Sequence[Sample]] | None = None,
    largest: StepShape | None = None,
) -> EngineGate:
    return make_engine_gate(
        ModelMemory(SIZES, itemsize=2),
        settings,
        ranks,
        smallest_chunk=64,
        largest=largest,
        entry=EntryKind(max_prompt=4096, divisible=True, logprobs_held_bytes=24),
        samples=samples or {},
        board=board,
        keep=keep,
    )


@pytest.fixture
def ranks() -> ToldRanks:
    """With 2 GiB free of 3."""
    return ToldRanks(Reading(1024 * MIB, 3072 * MIB))


def step(gate: EngineGate, shape: StepShape) -> int:
    """One step of an idle engine that runs this; its number."""
    gate.begin(gate.figures(), in_flight=False)
    order = gate.order(shape)
    return order.number


PLAIN = Candidate("x", 1000, 1000)
SHAPE = PLAIN.joined_to(NOTHING, 1000)


def test_equal_figures_give_equal_decisions_and_orders(ranks: ToldRanks) -> None:
    """One rank's figures travel as plain data; another decides alike for 400 steps, and learns."""
    chance = random.Random(3)
    leader, follower = a_gate(ranks), a_gate(SilentRanks())
    outcomes = set()
    queue = [
        Candidate(f"r{n}", wanted := chance.randrange(1, 4000), wanted, prompt_logprobs=n % 5 == 0)
        for n in range(60)
    ]
    for number in range(400):
        ranks.now = Reading(chance.randrange(900, 2900) * MIB, 3072 * MIB)
        figures = leader.figures()._replace(now=number * 0.5)
        copy = msgspec.msgpack.decode(msgspec.msgpack.encode(figures), type=StepFigures)
        running = StepShape(tokens=chance.randrange(3))
        ranks.peaks = []
        asked = chance.sample(queue, 4)
        for gate, told in ((leader, figures), (follower, copy)):
            gate.begin(told, running=running, in_flight=running.tokens > 0)
        decided = [[gate.decide(each) for each in asked] for gate in (leader, follower)]
        assert decided[0] == decided[1]
        outcomes |= {decision.outcome for decision in decided[0]}
        orders = [gate.order(gate.gate.planned) for gate in (leader, follower)]
        assert orders[0] == orders[1]
        order, planned = orders[0], leader.gate.planned
        if order.measure:
            ranks.peaks = [Measured(order.number, round(true_peak(planned, chance)))]
    assert {"run", "shrink", "defer", "reclaim"} <= outcomes
    assert leader.report() == follower.report()
    assert leader.report().recent


def test_a_reclaim_is_ordered_once_and_the_next_step_judged_anew(ranks: ToldRanks) -> None:
    """What was read before memory came back counts no more."""
    gate = a_gate(ranks)
    ranks.now = Reading(3071 * MIB, 3072 * MIB)
    gate.begin(gate.figures(), in_flight=False)
    assert gate.decide(PLAIN).outcome == "reclaim"
    order = gate.order(NOTHING)
    assert (order.give_back, order.measure) == (True, False)
    ranks.now = Reading(1024 * MIB, 3072 * MIB)
    gate.begin(gate.figures(), in_flight=True)
    assert gate.decide(PLAIN).outcome == "run"
    order = gate.order(SHAPE)
    assert not order.give_back


def test_peaks_are_learned_by_the_number_of_their_step(ranks: ToldRanks) -> None:
    """In whatever order they come, each once; of numbers that nobody gave, nothing is learned."""
    gate = a_gate(ranks)
    small = Candidate("y", 10, 10).joined_to(NOTHING, 10)
    first, second = step(gate, SHAPE), step(gate, small)
    ranks.peaks = [Measured(second, 5 * MIB), Measured(first, 50 * MIB), Measured(99, 1)]
    step(gate, NOTHING)
    step(gate, NOTHING)
    told = [(each.tokens, each.measured_bytes) for each in gate.report().recent]
    assert told == [(10, 5 * MIB), (1000, 50 * MIB)]


def test_a_step_whose_peak_never_comes_is_dropped(ranks: ToldRanks) -> None:
    """Ranks may lose one; what is awaited stays bounded, and the newest are still learned."""
    gate = a_gate(ranks)
    numbers = [step(gate, SHAPE) for _ in range(3 * SHOWN_STEPS)]
    ranks.peaks = [Measured(number, number * MIB) for number in numbers]
    step(gate, NOTHING)
    told = [each.measured_bytes // MIB for each in gate.report().recent]
    assert told == numbers[-SHOWN_STEPS:]


def test_what_was_measured_is_what_the_next_step_is_judged_by(ranks: ToldRanks) -> None:
    """Eight steps of a size are measured, then one in a few; their peak is then expected."""
    gate = a_gate(ranks)
    measured = []
    for _ in range(40):
        gate.begin(gate.figures(), in_flight=False)
        order = gate.order(SHAPE)
        measured.append(order.measure)
        ranks.peaks = [Measured(order.number, 200 * MIB)] if order.measure else []
    assert measured[:9] == [True] * 9, "the first is cold, and not counted"
    assert 1 <= sum(measured[10:]) <= 3
    gate.begin(gate.figures(), in_flight=False)
    assert gate.decide(PLAIN).peak_bytes == pytest.approx(200 * MIB, rel=0.02)
    assert gate.report().calibration["layers"].samples == 8


def test_a_judged_step_clears_others_until_settings_change(ranks: ToldRanks) -> None:
    """A change, a reset and a step that found no memory have the next one judged."""
    gate = a_gate(ranks, largest=StepShape(tokens=1500))
    gate.gate.memory.restore(calibrated(a_memory()).samples, now=0.0)
    assert not gate.clearance.take(1, 1)

    def judged() -> None:
        gate.begin(gate.figures(), in_flight=True)
        gate.order(SHAPE, rows=1)

    judged()
    assert gate.clearance.take(1, 1)
    assert gate.report().cleared_steps == 1
    gate.configure({"cap_bytes": 2500 * MIB})
    assert not gate.clearance.take(1, 1)
    judged()
    assert gate.clearance.take(1, 1)
    gate.ran_out(SHAPE)
    assert not gate.clearance.take(1, 1)
    gate.begin(gate.figures(), in_flight=True)
    gate.order(SHAPE)
    assert not gate.clearance.take(1, 1), "nobody said how many rows there may be"
    ranks.now, roomy = Reading(3071 * MIB, 3072 * MIB), ranks.now
    gate.begin(gate.figures(), in_flight=True)
    assert gate.decide(PLAIN).outcome == "defer"
    ranks.now = roomy
    gate.gate.reclaimed()
    judged()
    assert not gate.clearance.take(1, 1), "somebody waits"
    gate.forget(["x"], idle=False)
    judged()
    gate.reset()
    assert not gate.clearance.take(1, 1)
    assert gate.report().cleared_steps == 0
    judged()
    assert not gate.clearance.take(1, 1), "nothing is measured"


def test_nothing_is_measured_of_an_empty_step(ranks: ToldRanks) -> None:
    """Its number is given all the same."""
    gate = a_gate(ranks)
    orders = [gate.order(NOTHING) for _ in range(20)]
    assert not any(order.measure for order in orders)
    assert [order.number for order in orders] == list(range(1, 21))


def test_a_board_of_which_nothing_was_said_yet_is_none(tmp_path: Path, ranks: ToldRanks) -> None:
    """Then limits and report, from the start on and at each change."""
    create_runtime_dir(tmp_path)
    reader = GateBoard(tmp_path)
    assert reader.read() is None
    gate = a_gate(ranks, board=GateBoard(tmp_path))
    said = reader.read()
    assert said is not None
    assert said.limits.enforced
    assert said.report == gate.report()
    gate.configure({"mode": "observe"})
    changed = reader.read()
    assert changed is not None
    assert not changed.limits.enforced
    assert reader.read() is changed, "what is known is not read again"


def test_the_counts_are_on_the_board_once_the_engine_is_idle(
    tmp_path: Path, ranks: ToldRanks
) -> None:
    """Whoever looks after the last request sees it."""
    create_runtime_dir(tmp_path)
    gate, reader = a_gate(ranks, board=GateBoard(tmp_path)), GateBoard(tmp_path)
    gate.begin(gate.figures(), in_flight=False)
    assert gate.decide(PLAIN).outcome == "run"
    gate.forget(["x"], idle=True)
    said = reader.read()
    assert said is not None
    assert said.report.decisions["run"] == 1


def test_every_second_limits_are_told_anew(
    tmp_path: Path, ranks: ToldRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step asks for it; steps in between do not."""
    create_runtime_dir(tmp_path)
    monkeypatch.setattr(engine_gate, "PUBLISH_S", 0.0)
    gate, reader = a_gate(ranks, board=GateBoard(tmp_path)), GateBoard(tmp_path)
    gate.begin(gate.figures(), in_flight=False)
    first = reader.read()
    assert first is not None
    assert first.report.used_bytes == 1024 * MIB
    monkeypatch.setattr(engine_gate, "PUBLISH_S", 1e9)
    gate.begin(gate.figures(), in_flight=False)
    assert reader.read() is first


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "on"},
        {"cap_bytes": 1 << 60},
        {"cap_bytes": 0},
        {"margin_quantile": 0.0},
        {"margin_bytes": -1},
        {"mode": "off", "margin_bytes": -1},
    ],
)
def test_a_change_that_makes_no_sense_changes_nothing(
    ranks: ToldRanks, changes: dict[str, object]
) -> None:
    """Of several, none."""
    gate = a_gate(ranks)
    before = gate.report()
    with pytest.raises(SettingsError):
        gate.configure(changes)
    assert gate.report() == before
    assert gate.is_on


def test_a_configured_cap_stands_for_what_is_free(ranks: ToldRanks) -> None:
    """From the next figures on, until it is taken back."""
    gate = a_gate(ranks)
    gate.configure({"cap_bytes": 1500 * MIB})
    assert gate.figures().reading == Reading(1024 * MIB, 1500 * MIB)
    gate.configure({"cap_bytes": None})
    assert gate.figures().reading == ranks.now


def test_a_cap_above_the_machine_is_refused_at_the_start(ranks: ToldRanks) -> None:
    """With both figures."""
    wrong = Settings(prefill_gate="enforce", prefill_cap_bytes=1 << 60)
    with pytest.raises(SettingsError, match="PREFILL_CAP_BYTES"):
        a_gate(ranks, wrong)


def test_one_that_is_off_need_not_be_asked(ranks: ToldRanks) -> None:
    """Until it is turned on."""
    gate = a_gate(ranks, Settings())
    assert not gate.is_on
    gate.configure({"mode": "observe"})
    assert gate.is_on


def test_measurements_outlive_the_engine_and_a_reset_forgets_them(
    tmp_path: Path, ranks: ToldRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept now and then by one scheduler, and read at the next start."""
    kept = calibration_file(Settings(prefill_calibration_dir=tmp_path), KEY)
    monkeypatch.setattr(engine_gate, "PUBLISH_S", 0.0)
    monkeypatch.setattr(engine_gate, "KEEP_S", 0.0)
    gate = a_gate(ranks, keep=kept.write)
    for _ in range(4):
        ranks.peaks = [Measured(step(gate, SHAPE), 60 * MIB)]
    step(gate, NOTHING)
    samples = kept.read(now=time.time())
    assert [round(each.measured) for each in samples["layers"]] == [60 * MIB] * 3
    again = a_gate(ranks, samples=samples, keep=kept.write)
    assert again.report().calibration["layers"].samples == 3
    again.reset()
    assert again.report().calibration["layers"].samples == 0
    assert not any(kept.read(now=time.time()).values())


def test_a_folder_that_cannot_be_written_hurts_nothing(
    tmp_path: Path,
    ranks: ToldRanks,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A file where the folder should be: there is a warning, and the gate goes on."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    kept = calibration_file(Settings(prefill_calibration_dir=blocked), KEY)
    monkeypatch.setattr(engine_gate, "PUBLISH_S", 0.0)
    monkeypatch.setattr(engine_gate, "KEEP_S", 0.0)
    with caplog.at_level(logging.WARNING):
        gate = a_gate(ranks, keep=kept.write, samples=kept.read(now=time.time()))
        gate.begin(gate.figures(), in_flight=False)
        assert gate.decide(PLAIN).outcome == "run"
        gate.reset()
    assert "not kept for the next start" in caplog.text
    assert gate.report().decisions["run"] == 0


KEY = CalibrationKey(model="m", engine="e 1", tp_size=1, backend="cpu", prior={})


def test_a_cap_is_held_against_the_gpu_where_there_is_one() -> None:
    """A GPU may be larger than the host's memory, and smaller."""
    beyond = 1 << 50
    require_cap(Settings(prefill_cap_bytes=beyond), device_bytes=beyond)
    with pytest.raises(SettingsError, match="GPU's memory"):
        require_cap(Settings(prefill_cap_bytes=101), device_bytes=100)
    with pytest.raises(SettingsError, match="machine's memory"):
        require_cap(Settings(prefill_cap_bytes=beyond))
