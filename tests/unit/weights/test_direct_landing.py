"""Updates whose bytes land in live parameters: when they may, what they prove, how they fail."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from engine_plugins.errors import ConflictError, PeerLostError, TransferTimeoutError, UnknownIdError
from engine_plugins.weights.contract.destinations import Destination
from engine_plugins.weights.transport.transfers import run_transfers
from tests.support.in_memory_model import InMemoryModel, hf_tensors, pack_norms
from tests.support.in_memory_rank import InMemoryRank
from tests.support.source_ranks import SourceRank, offered_tensors

LAYERS = 6
MODULES = 2 * LAYERS + 2


@pytest.fixture
def rank() -> Iterator[InMemoryRank]:
    """A rank that serves the weights of seed 0 and may be landed in."""
    model = InMemoryModel.loaded(hf_tensors(seed=0, layers=LAYERS))
    made = InMemoryRank(model, direct_landing=True, stall_timeout_s=0.3)
    yield made
    made.close()


@pytest.fixture
def trainer() -> Iterator[SourceRank]:
    """A trainer that offers the weights of seed 1."""
    with offered_tensors(hf_tensors(seed=1, layers=LAYERS)) as made:
        yield made


def proven(rank: InMemoryRank, trainer: SourceRank) -> None:
    """Connect and take the first update, which the loader installs and which proves the map."""
    rank.receiver.connect("plan", [trainer.manifest])
    rank.receiver.start("plan", staged=False, timeout_s=10)
    report = rank.install_all()
    assert (report.direct_bytes, report.loader_bytes) == (0, trainer.source.nbytes)
    assert rank.installer.landings == []


def test_the_first_update_proves_the_map_and_the_next_lands_directly(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """No byte of it passes a receive buffer, but for rows that are spread from scratch."""
    proven(rank, trainer)
    for seed in (2, 3):
        trainer.hold(hf_tensors(seed=seed, layers=LAYERS))
        rank.receiver.start("plan", staged=False, timeout_s=10)
        report = rank.install_all()
        assert rank.serves(seed=seed)
        assert report.direct_bytes == report.bytes_moved == trainer.source.nbytes
        assert report.loader_bytes == report.staged_bytes == 0
        assert len(rank.installer.landings) == MODULES
    again = rank.receiver.connect("again", [trainer.manifest])
    assert again.plan.direct_bytes == trainer.source.nbytes
    assert again.plan.largest_step_bytes == 0
    assert again.plan.reasons == []


def test_nothing_lands_before_the_engine_stands_still(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """The pull says that it can go no further, and waits."""
    proven(rank, trainer)
    trainer.hold(hf_tensors(seed=2, layers=LAYERS))
    rank.receiver.start("plan", staged=False, timeout_s=10)
    until = time.monotonic() + 5
    while not (status := rank.receiver.poll()).may_begin:
        assert time.monotonic() < until
    time.sleep(0.05)
    assert (status.steps_ready, status.bytes_done, status.wrote) == (0, 0, False)
    assert rank.serves(seed=1)
    aborted = rank.receiver.abort()
    assert (aborted.wrote, aborted.lost) == (False, False)
    assert rank.serves(seed=1)


def test_staged_copies_to_where_the_loader_would(rank: InMemoryRank, trainer: SourceRank) -> None:
    """The old weights serve until everything is here; then no loader is asked."""
    proven(rank, trainer)
    trainer.hold(hf_tensors(seed=2, layers=LAYERS))
    rank.receiver.start("plan", staged=True, timeout_s=10)
    assert rank.wait().may_begin
    assert rank.serves(seed=1)
    report = rank.install_all()
    assert rank.serves(seed=2)
    assert (report.direct_bytes, report.staged_bytes) == (0, trainer.source.nbytes)


def test_a_live_parameter_that_holds_other_values_goes_through_the_loader(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """Same name, same shape, another layout: only its values tell."""
    pack_norms(rank.installer.model)
    proven(rank, trainer)
    result = rank.receiver.connect("plan", [trainer.manifest])
    norm = rank.model.get_parameter("norm.weight").nbytes
    assert result.plan.loader_bytes == norm
    assert result.plan.direct_bytes == trainer.source.nbytes - norm
    (reason,) = result.plan.reasons
    assert reason == "norm: norm.weight holds other values than the loader copied"


def test_another_source_of_the_same_model_need_not_prove_the_map_again(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """Its tensors come in another order, as a peer's do."""
    proven(rank, trainer)
    backwards = dict(reversed(hf_tensors(seed=2, layers=LAYERS).items()))
    with offered_tensors(backwards) as other:
        result = rank.receiver.connect("other", [other.manifest])
        assert result.plan.direct_bytes == other.source.nbytes
        rank.receiver.start("other", staged=False, timeout_s=10)
        rank.install_all()
    assert rank.serves(seed=2)


def test_parameters_that_moved_have_to_be_proven_anew(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """As after a sleep that gave the memory back."""
    proven(rank, trainer)
    with torch.no_grad():
        for parameter in rank.model.parameters():
            parameter.data = parameter.data.clone()
    trainer.hold(hf_tensors(seed=2, layers=LAYERS))
    rank.receiver.start("plan", staged=False, timeout_s=10)
    report = rank.install_all()
    assert rank.serves(seed=2)
    assert (report.direct_bytes, report.loader_bytes) == (0, trainer.source.nbytes)


def test_a_trainer_that_died_is_found_before_anything_is_written(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """While the old weights are whole."""
    proven(rank, trainer)
    rank.receiver.start("plan", staged=False, timeout_s=10)
    rank.install_all()
    trainer.transport.close()
    rank.receiver.start("plan", staged=False, timeout_s=10)
    status = rank.wait()
    assert isinstance(status.error, PeerLostError)
    assert not rank.receiver.abort().wrote
    assert rank.serves(seed=1)


def test_a_read_that_never_ends_makes_live_memory_unusable_for_good(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """Its bytes may still come at any time, into whatever serves then."""
    proven(rank, trainer)
    rank.receiver.start("plan", staged=False, timeout_s=0.5)
    until = time.monotonic() + 5
    while not rank.receiver.poll().may_begin:
        assert time.monotonic() < until
    trainer.transport.bytes_per_s = 0
    with pytest.raises(TransferTimeoutError, match=trainer.transport.agent):
        rank.install_all()
    aborted = rank.receiver.abort()
    assert (aborted.wrote, aborted.lost) == (True, True)
    with pytest.raises(ConflictError, match="still come into its live parameters") as refused:
        rank.receiver.start("plan", staged=False, timeout_s=1)
    assert refused.value.remedy == "restart the engine"
    with pytest.raises(ConflictError):
        rank.receiver.connect("other", [trainer.manifest])


# -- push -------------------------------------------------------------------------------------


def push(rank: InMemoryRank, trainer: SourceRank, destination: Destination) -> int:
    """Write what the rank asks of this trainer; the bytes written."""
    trainer.transport.add_peer(destination.agent, destination.agent_metadata)
    writes = [
        trainer.transport.prepare_write(
            destination.agent, rows, local_device=mine, remote_device=theirs
        )
        for mine, theirs, rows in destination.writes[trainer.transport.agent].by_devices()
    ]
    return run_transfers(writes, deadline_s=10)


def connected(rank: InMemoryRank, trainer: SourceRank, plan_id: str = "push") -> Destination:
    result = rank.receiver.connect(plan_id, [trainer.manifest], direction="push")
    assert result.destination is not None
    return result.destination


def test_a_push_fills_the_receive_buffer_and_then_live_parameters(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """The first goes through the loader and proves the map; connected anew, the next lands."""
    destination = connected(rank, trainer)
    status = rank.receiver.start("push", staged=True, timeout_s=10)
    assert not status.wrote
    push(rank, trainer, destination)
    assert rank.serves(seed=0)
    rank.receiver.written()
    report = rank.install_all()
    assert rank.serves(seed=1)
    assert (report.direct_bytes, report.loader_bytes) == (0, trainer.source.nbytes)

    trainer.hold(hf_tensors(seed=2, layers=LAYERS))
    destination = connected(rank, trainer, "direct")
    assert rank.receiver.start("direct", staged=True, timeout_s=10).wrote
    written = push(rank, trainer, destination)
    rank.receiver.written()
    report = rank.install_all()
    assert rank.serves(seed=2)
    assert report.direct_bytes == written == trainer.source.nbytes


@pytest.mark.parametrize(("ended", "lost"), [(True, False), (False, True), (None, True)])
def test_a_push_that_is_given_up_is_safe_only_if_its_writes_have_ended(
    rank: InMemoryRank, trainer: SourceRank, ended: bool | None, lost: bool
) -> None:
    proven(rank, trainer)
    connected(rank, trainer)
    rank.receiver.start("push", staged=True, timeout_s=10)
    aborted = rank.receiver.abort(writes_ended=ended)
    assert (aborted.wrote, aborted.lost) == (True, lost)


def test_memory_that_a_push_was_told_of_is_the_memory_that_it_gets(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """Another plan has taken its place: the trainer must be told anew."""
    connected(rank, trainer)
    rank.receiver.connect("other", [trainer.manifest])
    with pytest.raises(UnknownIdError, match="no longer holds the memory that plan push told of"):
        rank.receiver.start("push", staged=True, timeout_s=10)


def test_only_a_push_can_be_written(rank: InMemoryRank, trainer: SourceRank) -> None:
    rank.receiver.connect("plan", [trainer.manifest])
    rank.receiver.start("plan", staged=False, timeout_s=10)
    with pytest.raises(ConflictError, match="pulls, nobody writes"):
        rank.receiver.written()
