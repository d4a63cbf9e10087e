"""One rank's updates: every byte arrives, none is overwritten early, no failure goes unsaid."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import msgspec
import psutil
import pytest
import torch

from engine_plugins.errors import (
    ConflictError,
    PeerError,
    PeerLostError,
    PlanError,
    TransferTimeoutError,
    TransportError,
    UnknownIdError,
    UnsupportedError,
    WeightMismatchError,
)
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.receiving import receiver
from engine_plugins.weights.receiving.connection import Direction
from engine_plugins.weights.receiving.update_run import STOP_S
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport import transfers
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from engine_plugins.weights.transport.quarantine import quarantined_bytes
from tests.support.in_memory_model import InMemoryModel, hf_tensors
from tests.support.in_memory_rank import InMemoryRank
from tests.support.source_ranks import SourceRank, offered_boxes, offered_tensors

LAYERS = 6
SLOW = 1e4
"""Bytes per second at which a pull of the test's model lasts several seconds."""


@pytest.fixture
def rank() -> Iterator[InMemoryRank]:
    """A rank that serves the weights of seed 0."""
    made = InMemoryRank(InMemoryModel.loaded(hf_tensors(seed=0, layers=LAYERS)))
    yield made
    made.close()


@pytest.fixture
def trainer() -> Iterator[SourceRank]:
    """A trainer that offers the weights of seed 1."""
    with offered_tensors(hf_tensors(seed=1, layers=LAYERS)) as made:
        yield made


def connect(rank: InMemoryRank, *trainers: SourceRank, plan_id: str = "plan") -> None:
    rank.receiver.connect(plan_id, [trainer.manifest for trainer in trainers])


def test_copies_of_ours_are_waited_for_before_the_engine_goes_on(
    rank: InMemoryRank, trainer: SourceRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last install, and before the engine looks at the weights: its streams are its own.

    Of the memory that we copy to ourselves; what the loader copies is the engine's.
    """
    told: list[str] = []
    finish = rank.installer.finish
    monkeypatch.setattr(
        receiver, "finish_queued_work", lambda tensors: told.append(f"wait {bool([*tensors])}")
    )

    def finishing() -> None:
        told.append("finish")
        finish()

    monkeypatch.setattr(rank.installer, "finish", finishing)
    monkeypatch.setattr(rank.receiver, "_direct_landing", True)
    connect(rank, trainer)
    for _ in range(2):
        rank.receiver.start("plan", staged=True, timeout_s=10)
        rank.install_all()
        assert told == ["wait True", "finish"]
        told.clear()


# -- whole updates ----------------------------------------------------------------------------


def test_staging_more_than_the_machine_holds_is_refused(
    rank: InMemoryRank, trainer: SourceRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both figures, before a byte is fetched; in place goes on as usual."""
    connect(rank, trainer)
    little = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    with pytest.raises(UnsupportedError, match=r"staging needs .* 0\.0 are free"):
        rank.receiver.start("plan", staged=True, timeout_s=10)
    rank.receiver.start("plan", staged=False, timeout_s=10)
    rank.install_all()
    assert rank.serves(seed=1)


@pytest.mark.parametrize("staged", [False, True])
def test_an_update_leaves_exactly_the_trainers_weights(
    rank: InMemoryRank, trainer: SourceRank, staged: bool
) -> None:
    """In place or staged: bit for bit a fresh start, and a report that adds up."""
    result = rank.receiver.connect("plan", [trainer.manifest])
    assert result.unused == []
    assert result.plan.bytes_needed == result.plan.bytes_to_move == trainer.source.nbytes
    assert result.plan.steps == 2 * LAYERS + 2
    rank.receiver.start("plan", staged=staged, timeout_s=10)
    rank.wait(steps=None if staged else 1)
    assert rank.serves(seed=0), "pulling alone must not touch what serves"
    report = rank.install_all()
    assert rank.serves(seed=1)
    assert report.bytes_moved == trainer.source.nbytes
    assert report.wire_s > 0
    assert report.install_s > 0
    assert report.peak_extra_bytes >= -1


@pytest.mark.parametrize(("tp_rank", "tp_size"), [(0, 2), (1, 2)])
def test_sharded_trainers_fill_a_sharded_engine(tp_rank: int, tp_size: int) -> None:
    """Rows from one trainer rank, columns from another, replicas of the rest."""
    tensors = hf_tensors(seed=1)
    ranks: list[list[SourceBox]] = [[], []]
    for name, data in tensors.items():
        axis = {"o_proj": 1, "q_proj": 0, "k_proj": 0, "v_proj": 0}.get(name.split(".")[-2])
        for trainer_rank, boxes in enumerate(ranks):
            start, part = [0] * data.ndim, data
            if axis is not None:
                width = data.shape[axis] // 2
                start[axis] = trainer_rank * width
                part = data.narrow(axis, start[axis], width).clone()
            boxes.append(
                SourceBox(name=name, global_shape=tuple(data.shape), start=tuple(start), data=part)
            )
    old = InMemoryModel.loaded(hf_tensors(seed=0), tp_rank=tp_rank, tp_size=tp_size)
    rank = InMemoryRank(old, tp_rank=tp_rank)
    with offered_boxes(*ranks) as trainers:
        connect(rank, *trainers)
        rank.receiver.start("plan", staged=False, timeout_s=10)
        rank.install_all()
        rank.close()
    assert old.equals(InMemoryModel.loaded(tensors, tp_rank=tp_rank, tp_size=tp_size))


def test_no_step_is_overwritten_before_it_is_installed(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """A wire that is done at once against an engine that installs slowly, through a small ring.

    What was installed is poisoned at once, so nothing that a later step did not bring can pass.
    """
    connect(rank, trainer)
    rank.installer.install_s = 0.005
    for seed in (1, 2, 3):
        trainer.hold(hf_tensors(seed=seed, layers=LAYERS))
        started = rank.receiver.start("plan", staged=False, timeout_s=10)
        time.sleep(0.02)
        waiting = rank.receiver.poll()
        assert 0 < waiting.steps_ready < started.steps_total, "the ring is smaller than the model"
        rank.install_all()
        assert rank.serves(seed=seed)


def test_an_update_repeats_the_prepared_reads_and_sees_the_new_bytes(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """Nothing is registered, met or prepared again; what the trainer wrote since then comes."""
    connect(rank, trainer)
    (agent,) = rank.transports
    regions = set(agent._regions._starts)
    prepared = _count_preparations(agent)
    for seed in (5, 6):
        trainer.hold(hf_tensors(seed=seed, layers=LAYERS))
        rank.receiver.start("plan", staged=False, timeout_s=10)
        assert rank.install_all().bytes_moved == trainer.source.nbytes
        assert rank.serves(seed=seed)
    assert prepared == []
    assert set(agent._regions._starts) == regions
    rank.receiver.start("plan", staged=True, timeout_s=10)
    assert prepared, "another arena needs other reads"
    rank.install_all()
    assert rank.serves(seed=6)


def _count_preparations(agent: InMemoryTransport) -> list[str]:
    seen: list[str] = []
    original = agent.prepare_read

    def counted(peer: str, *args: object, **kwargs: object) -> object:
        seen.append(peer)
        return original(peer, *args, **kwargs)  # type: ignore[arg-type]

    agent.prepare_read = counted  # type: ignore[assignment, method-assign]
    return seen


def test_the_receive_buffer_stays_below_two_of_the_largest_module(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """In place the whole model is never here at once; staged it is."""
    plan = rank.receiver.connect("plan", [trainer.manifest]).plan
    assert plan.largest_step_bytes <= plan.arena_bytes < 2 * plan.largest_step_bytes
    assert plan.arena_bytes < plan.bytes_needed
    rank.receiver.start("plan", staged=True, timeout_s=10)
    assert rank.receiver._memory.held_bytes >= plan.bytes_needed
    rank.receiver.abort()


def test_plans_are_kept_side_by_side(rank: InMemoryRank, trainer: SourceRank) -> None:
    """An older plan still works after a newer one was made, until it is dropped."""
    with offered_tensors(hf_tensors(seed=2, layers=LAYERS)) as other:
        connect(rank, trainer, plan_id="first")
        connect(rank, other, plan_id="second")
        for plan_id, seed in (("first", 1), ("second", 2), ("first", 1)):
            rank.receiver.start(plan_id, staged=False, timeout_s=10)
            rank.install_all()
            assert rank.serves(seed=seed)
        rank.receiver.drop("first")
        rank.receiver.drop("never heard of")
        with pytest.raises(UnknownIdError, match="first"):
            rank.receiver.start("first", staged=False, timeout_s=10)
        rank.receiver.start("second", staged=False, timeout_s=10)
        rank.install_all()
        assert rank.serves(seed=2)


# -- offers that do not fit -------------------------------------------------------------------


def test_an_offer_that_does_not_fit_changes_nothing(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """Missing tensors, gaps and dead peers are told at connect; the plan before still works."""
    connect(rank, trainer, plan_id="good")
    tensors = hf_tensors(seed=2, layers=LAYERS)
    gone = tensors.pop("model.layers.3.k_proj.weight")
    with offered_tensors(tensors) as poor, pytest.raises(WeightMismatchError, match=r"3\.k_proj"):
        connect(rank, poor, plan_id="bad")
    half = SourceBox(
        name="model.layers.3.k_proj.weight",
        global_shape=tuple(gone.shape),
        start=(0, 0),
        data=gone[:3],
    )
    gap = pytest.raises(PlanError, match=r"model\.layers\.3\.k_proj")
    with offered_boxes([*hf_boxes(tensors), half]) as (poor,), gap:
        connect(rank, poor, plan_id="bad")
    with offered_tensors(hf_tensors(seed=2, layers=LAYERS)) as dead:
        manifest = dead.manifest
        dead.transport.close()
        with pytest.raises(PeerLostError, match=manifest.agent):
            rank.receiver.connect("bad", [manifest])
    with pytest.raises(UnknownIdError):
        rank.receiver.start("bad", staged=False, timeout_s=10)
    assert rank.serves(seed=0)
    rank.receiver.start("good", staged=False, timeout_s=10)
    rank.install_all()
    assert rank.serves(seed=1)


@pytest.mark.parametrize("direction", ["pull", "push"])
def test_a_source_on_another_wire_is_refused(
    rank: InMemoryRank, trainer: SourceRank, direction: Direction
) -> None:
    """Before its metadata reaches a transport that cannot read it; both wires are named."""
    foreign = msgspec.structs.replace(trainer.manifest, transport="nixl")
    with pytest.raises(UnsupportedError, match=r"over 'nixl', .* over 'in_memory'"):
        rank.receiver.connect("plan", [foreign], direction=direction)
    assert rank.serves(seed=0)
    connect(rank, trainer)


def test_tensors_without_a_use_are_told(rank: InMemoryRank) -> None:
    """Not an error here: only all ranks together can tell."""
    tensors = hf_tensors(seed=1, layers=LAYERS)
    tensors |= {"vision.w": torch.zeros(3), "model.rotary_emb.inv_freq": torch.zeros(3)}
    with offered_tensors(tensors) as trainer:
        result = rank.receiver.connect("plan", [trainer.manifest])
        assert result.unused == ["vision.w"]
        assert result.plan.bytes_needed == trainer.source.nbytes - 24, "useless bytes stay away"


# -- order of calls ---------------------------------------------------------------------------


def test_calls_out_of_order_are_refused_and_break_nothing(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """Unknown plan, start twice, connect or drop in the middle, advance or finish too early."""
    with pytest.raises(UnknownIdError, match=r"rank 0 .* plan nothing"):
        rank.receiver.start("nothing", staged=False, timeout_s=10)
    for call in (
        rank.receiver.poll,
        lambda: rank.receiver.advance(budget_s=0.1),
        rank.receiver.finish,
    ):
        with pytest.raises(ConflictError, match="no update under way"):
            call()
    assert rank.receiver.abort().wrote is False
    connect(rank, trainer)
    rank.receiver.start("plan", staged=False, timeout_s=10)
    for again in (
        lambda: rank.receiver.start("plan", staged=False, timeout_s=10),
        lambda: connect(rank, trainer),
        lambda: rank.receiver.drop("plan"),
    ):
        with pytest.raises(ConflictError, match="in the middle of an update"):
            again()
    rank.install_all()
    assert rank.serves(seed=1)


def test_finishing_half_way_is_refused(rank: InMemoryRank, trainer: SourceRank) -> None:
    """It would end the load with some modules old and some new."""
    connect(rank, trainer)
    rank.receiver.start("plan", staged=False, timeout_s=10)
    rank.wait(steps=1)
    rank.installer.install_s = 0.05
    rank.receiver.advance(budget_s=0.01)
    with pytest.raises(ConflictError, match=r"rank 0 has 1 of 14 modules"):
        rank.receiver.finish()
    rank.install_all()
    assert rank.serves(seed=1)


def test_an_advance_gives_the_engine_back_when_its_time_is_over(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """With nothing here yet it waits no longer than it was told, and says how far it got."""
    connect(rank, trainer)
    trainer.transport.bytes_per_s = 0.0
    rank.receiver.start("plan", staged=False, timeout_s=30)
    began = time.monotonic()
    status = rank.receiver.advance(budget_s=0.1)
    assert 0.09 < time.monotonic() - began < 2
    assert (status.steps_installed, status.wrote) == (0, True)
    began = time.monotonic()
    rank.receiver.poll()
    assert time.monotonic() - began < 2, "a poll never waits for bytes"
    trainer.transport.bytes_per_s = None
    rank.install_all()
    assert rank.serves(seed=1)


# -- failures ---------------------------------------------------------------------------------


def test_a_peer_that_dies_in_mid_pull_is_named_with_what_it_was_giving(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """Rank, peer, tensors and bytes; the old weights are untouched and a new offer works."""
    connect(rank, trainer)
    trainer.transport.bytes_per_s = SLOW
    rank.receiver.start("plan", staged=True, timeout_s=30)
    rank.wait(steps=1)
    began = time.monotonic()
    trainer.transport.close()
    status = rank.wait()
    assert time.monotonic() - began < 5
    assert isinstance(status.error, PeerLostError)
    text = status.error.message
    assert text.startswith(f"rank 0: {trainer.manifest.agent}")
    assert "model.layers." in text
    assert f"{status.bytes_done} of {trainer.source.nbytes} bytes" in text
    with pytest.raises(PeerLostError):
        rank.receiver.advance(budget_s=10)
    assert rank.receiver.abort().wrote
    rank.model.load_weights(hf_tensors(seed=0, layers=LAYERS).items())

    before = quarantined_bytes()
    with offered_tensors(hf_tensors(seed=3, layers=LAYERS)) as successor:
        connect(rank, successor, plan_id="again")
        rank.receiver.start("again", staged=False, timeout_s=10)
        rank.install_all()
    assert rank.serves(seed=3)
    assert quarantined_bytes() == before, "a lost peer writes no more: its buffer can be reused"


def test_what_arrived_before_the_peer_died_is_installed_before_the_error(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """The error comes at the step that is missing, not before: progress is told truly."""
    connect(rank, trainer)
    trainer.transport.bytes_per_s = SLOW
    rank.receiver.start("plan", staged=True, timeout_s=30)
    rank.wait(steps=1)
    trainer.transport.close()
    ready = rank.wait().steps_ready
    with pytest.raises(PeerLostError):
        rank.receiver.advance(budget_s=10)
    assert rank.receiver.poll().steps_installed == ready > 0


def test_a_stalled_peer_ends_in_a_timeout_that_names_everything(trainer: SourceRank) -> None:
    """Rank, peer, tensors, bytes. Its reads may still land, so the buffer waits for them."""
    rank = InMemoryRank(
        InMemoryModel.loaded(hf_tensors(seed=0, layers=LAYERS)), tp_rank=3, stall_timeout_s=0.2
    )
    held = rank.receiver.connect("plan", [trainer.manifest]).plan.arena_bytes
    rank.receiver.start("plan", staged=False, timeout_s=60)
    before = quarantined_bytes()
    rank.wait(steps=1)
    trainer.transport.bytes_per_s = 0.0
    rank.receiver.abort()
    rank.receiver.start("plan", staged=False, timeout_s=60)
    began = time.monotonic()
    error = rank.wait().error
    assert time.monotonic() - began < 3
    assert isinstance(error, TransferTimeoutError)
    for said in ("rank 3: ", trainer.manifest.agent, "model.embed.weight", "after 0 of"):
        assert said in error.message
    assert f"of {trainer.source.nbytes} bytes" in error.message
    assert rank.receiver.abort().wrote is False
    assert quarantined_bytes() - before == held
    assert rank.serves(seed=0)

    trainer.transport.bytes_per_s = None
    rank.receiver.start("plan", staged=False, timeout_s=60)
    rank.install_all()
    assert rank.serves(seed=1)
    assert quarantined_bytes() == before, "its reads ended after all"
    rank.close()


def test_an_update_that_outlives_its_time_stops_although_it_moves(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """`timeout_s` bounds the pull, not only its silences."""
    connect(rank, trainer)
    trainer.transport.bytes_per_s = SLOW
    rank.receiver.start("plan", staged=True, timeout_s=0.3)
    error = rank.wait(within_s=3).error
    assert isinstance(error, TransferTimeoutError)
    rank.receiver.abort()


def test_a_pull_that_moves_is_no_stall_however_slow(
    trainer: SourceRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads that end one by one, for three times as long as a silence may be."""
    monkeypatch.setattr(transfers, "MAX_IN_FLIGHT", 1)
    monkeypatch.setattr(transfers, "MOST_DESCRIPTORS", 1)
    rank = InMemoryRank(
        InMemoryModel.loaded(hf_tensors(seed=0, layers=LAYERS)), stall_timeout_s=0.5
    )
    connect(rank, trainer)
    trainer.transport.bytes_per_s = trainer.source.nbytes / 1.5
    began = time.monotonic()
    rank.receiver.start("plan", staged=True, timeout_s=60)
    assert rank.wait().error is None
    assert time.monotonic() - began > 1.0
    rank.install_all()
    assert rank.serves(seed=1)
    rank.close()


def test_an_update_past_its_time_costs_no_memory_of_a_healthy_peer(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """What was under way has ended by the time of the error: the buffer is used again."""
    connect(rank, trainer)
    before = quarantined_bytes()
    trainer.transport.bytes_per_s = trainer.source.nbytes / 1.0
    rank.receiver.start("plan", staged=True, timeout_s=0.3)
    error = rank.wait(within_s=5).error
    assert isinstance(error, TransferTimeoutError)
    assert not error.stuck
    aborted = rank.receiver.abort()
    assert (aborted.wrote, aborted.lost) == (False, False)
    assert quarantined_bytes() == before
    assert STOP_S > transfers.DRAIN_S + 1, "an abort waits for as long as reads may take to end"
    trainer.transport.bytes_per_s = None
    rank.receiver.start("plan", staged=True, timeout_s=10)
    rank.install_all()
    assert rank.serves(seed=1)


def test_a_buffer_is_given_up_even_where_the_engine_cannot_be_put_right(
    trainer: SourceRank,
) -> None:
    """The engine's own trouble must not make late bytes land in memory that is used again."""
    rank = InMemoryRank(
        InMemoryModel.loaded(hf_tensors(seed=0, layers=LAYERS)), stall_timeout_s=0.1
    )
    connect(rank, trainer)
    trainer.transport.bytes_per_s = 0.0
    before = quarantined_bytes()
    rank.receiver.start("plan", staged=False, timeout_s=60)
    rank.receiver.advance(budget_s=0.01)
    assert isinstance(rank.wait().error, TransferTimeoutError)
    rank.installer.failures["abandon"] = 0
    with pytest.raises(RuntimeError, match="abandon"):
        rank.receiver.abort()
    assert quarantined_bytes() > before
    rank.close()


def test_a_source_that_took_its_memory_back_fails_the_update_and_not_the_next(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """A read that failed is in no state to be posted again: it is prepared anew."""
    connect(rank, trainer)
    boxes = trainer.source._describe()
    trainer.source.close()
    rank.receiver.start("plan", staged=False, timeout_s=10)
    error = rank.wait().error
    assert isinstance(error, PeerError)
    assert "model.embed.weight" in error.message
    rank.receiver.abort()
    with WeightSource(boxes, trainer.transport):
        rank.receiver.start("plan", staged=False, timeout_s=10)
        rank.install_all()
    assert rank.serves(seed=1)


def test_an_abort_before_the_first_install_leaves_the_old_weights(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """It stops a pull under way, says that nothing was written, and the next update works."""
    connect(rank, trainer)
    trainer.transport.bytes_per_s = 1e6
    rank.receiver.start("plan", staged=False, timeout_s=60)
    rank.wait(steps=1)
    began = time.monotonic()
    assert rank.receiver.abort().wrote is False
    assert time.monotonic() - began < 2.5
    assert rank.serves(seed=0)
    assert not rank.installer.loading
    assert not [each for each in threading.enumerate() if each.name == "weight-pull"]
    rank.receiver.start("plan", staged=False, timeout_s=60)
    rank.install_all()
    assert rank.serves(seed=1)


def test_an_abort_after_the_first_install_says_so_and_leaves_a_loadable_engine(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """The weights are a mixture now; only completing an update helps, and it does."""
    connect(rank, trainer)
    rank.installer.install_s = 0.05
    rank.receiver.start("plan", staged=False, timeout_s=60)
    assert rank.receiver.advance(budget_s=0.01).steps_installed == 1
    assert rank.receiver.abort().wrote is True
    assert not rank.installer.loading
    assert not rank.serves(seed=0)
    assert not rank.serves(seed=1)
    rank.installer.install_s = 0.0
    rank.receiver.start("plan", staged=False, timeout_s=60)
    rank.install_all()
    assert rank.serves(seed=1)


@pytest.mark.parametrize("method", ["begin", "install", "finish"])
def test_an_engine_that_fails_to_load_counts_as_written(
    rank: InMemoryRank, trainer: SourceRank, method: str
) -> None:
    """Whatever it did before it failed is unknown, so the answer is the careful one."""
    connect(rank, trainer)
    rank.installer.failures[method] = 3 if method == "install" else 0
    rank.receiver.start("plan", staged=False, timeout_s=60)
    with pytest.raises(RuntimeError, match=method):
        rank.install_all()
    assert rank.receiver.abort().wrote is True
    rank.receiver.start("plan", staged=False, timeout_s=60)
    rank.install_all()
    assert rank.serves(seed=1)


def test_any_failure_of_the_wire_is_told_to_whoever_polls(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """The pull's thread has nobody to raise to."""
    connect(rank, trainer)
    trainer.transport.bytes_per_s = 0
    rank.receiver.start("plan", staged=False, timeout_s=60)
    rank.transports[0].remove_peer(trainer.manifest.agent)
    error = rank.wait().error
    assert isinstance(error, TransportError)
    assert error.message.startswith("rank 0: ")
    rank.receiver.abort()


def test_closing_in_mid_update_ends_the_pull(rank: InMemoryRank, trainer: SourceRank) -> None:
    """A worker that shuts down leaves no thread and no registration."""
    connect(rank, trainer)
    trainer.transport.bytes_per_s = 1e6
    rank.receiver.start("plan", staged=False, timeout_s=60)
    rank.close()
    rank.close()
    assert not [each for each in threading.enumerate() if each.name == "weight-pull"]
