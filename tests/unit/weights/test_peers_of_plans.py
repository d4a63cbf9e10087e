"""Which sources a rank meets, which it forgets, and when it has the memory back that one lost."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from engine_plugins.errors import TransferTimeoutError, UnsupportedError
from engine_plugins.weights.peers import meeting
from engine_plugins.weights.planning.source_choice import Reader
from engine_plugins.weights.receiving.connection import Direction
from engine_plugins.weights.receiving.receiver import WeightReceiver
from engine_plugins.weights.receiving.staging import choose_mode
from engine_plugins.weights.transport import transfers
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from engine_plugins.weights.transport.quarantine import quarantined_bytes
from tests.support.in_memory_model import InMemoryInstaller, InMemoryModel, hf_tensors
from tests.support.in_memory_rank import InMemoryRank
from tests.support.source_ranks import SourceRank, offered_tensors

pytestmark = pytest.mark.core


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryRank]:
    """A rank that serves the weights of seed 0, and does not wait long for what stands still."""
    monkeypatch.setattr(transfers, "DRAIN_S", 0.05)
    made = InMemoryRank(InMemoryModel.loaded(hf_tensors(seed=0)), stall_timeout_s=0.1)
    yield made
    made.close()


def peers(rank: InMemoryRank) -> set[str]:
    """Whom the rank's newest agent knows."""
    return set(rank.transports[-1]._peers)


# -- sources that no plan reads --------------------------------------------------------------


@pytest.mark.parametrize("direction", ["pull", "push"])
def test_only_sources_that_a_plan_reads_are_met(direction: Direction) -> None:
    """The rank of another rail says nothing, and nobody asks it: not even whether it is there."""
    tensors = hf_tensors(seed=1)
    agent = InMemoryTransport("engine")
    receiver = WeightReceiver(
        InMemoryInstaller(InMemoryModel.loaded(hf_tensors(seed=0))),
        lambda: agent,
        tp_rank=0,
        stall_timeout_s=1.0,
        reader=Reader(policy="same_rank", tp_rank=0, tp_size=2),
    )
    with (
        offered_tensors(tensors) as mine,
        offered_tensors({name: data.clone() for name, data in tensors.items()}) as other,
    ):
        other.transport.bytes_per_s = 0.0
        manifests = [
            msgspec.structs.replace(each.manifest, global_rank=number)
            for number, each in enumerate((mine, other))
        ]
        result = receiver.connect("plan", manifests, direction=direction)
        assert result.plan.bytes_needed == mine.source.nbytes
        receiver.start("plan", staged=False, timeout_s=5)
        if direction == "push":
            receiver.look()
        assert set(agent._peers) == {mine.manifest.agent}
        receiver.abort(writes_ended=True)
    receiver.close()


def test_peers_are_met_again_once_they_were_forgotten_and_not_before(
    rank: InMemoryRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first contact may hang although both sides live; one that stood does not."""
    met: list[str] = []
    plain = meeting.meet_agent

    def noting(transport: InMemoryTransport, agent: str, *args: object, **kwargs: object) -> None:
        met.append(agent)
        plain(transport, agent, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(meeting, "meet_agent", noting)
    with offered_tensors(hf_tensors(seed=1)) as one:
        rank.receiver.connect("plan", [one.manifest])
        rank.receiver.start("plan", staged=True, timeout_s=5)
        rank.install_all()
        assert met == [one.manifest.agent], "an update meets nobody again"
        rank.receiver.let_go(lost=False)
        assert peers(rank) == set()
        rank.receiver.start("plan", staged=True, timeout_s=5)
        rank.install_all()
        assert met == [one.manifest.agent] * 2


# -- sources that are gone -------------------------------------------------------------------


def test_senders_that_come_and_go_leave_nothing(rank: InMemoryRank) -> None:
    """One sender for each step, as `with WeightSender(...)` in a loop does."""
    for step in range(20):
        with offered_tensors(hf_tensors(seed=step)) as trainer:
            rank.receiver.connect(f"plan-{step}", [trainer.manifest])
            assert peers(rank) == {trainer.manifest.agent}
            rank.receiver.drop(f"plan-{step}")
    assert peers(rank) == set()
    assert len(rank.transports) == 1


def test_a_plan_that_is_kept_keeps_its_peers(rank: InMemoryRank) -> None:
    """Until it is dropped, or a sleep gives everything back."""
    with offered_tensors(hf_tensors(seed=1)) as one, offered_tensors(hf_tensors(seed=2)) as two:
        rank.receiver.connect("one", [one.manifest])
        rank.receiver.connect("two", [two.manifest])
        rank.receiver.drop("two")
        assert peers(rank) == {one.manifest.agent}
        rank.receiver.connect("two", [two.manifest])
        rank.receiver.drop("one")
        assert peers(rank) == {two.manifest.agent}
        rank.receiver.let_go(lost=True)
        assert peers(rank) == set()


def test_a_sender_that_could_not_be_met_is_forgotten_too(
    rank: InMemoryRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The admin side drops a plan that a rank refused."""
    monkeypatch.setattr(meeting, "PATIENCE_S", (0.02,))
    with offered_tensors(hf_tensors(seed=1)) as trainer:
        trainer.transport.bytes_per_s = 0.0
        with pytest.raises(TransferTimeoutError):
            rank.receiver.connect("plan", [trainer.manifest])
        rank.receiver.drop("plan")
        assert peers(rank) == set()


# -- memory that they lost --------------------------------------------------------------------


def lose(rank: InMemoryRank, trainer: SourceRank) -> int:
    """Break a staged pull in its middle; say how many bytes that cost."""
    before = quarantined_bytes()
    rank.receiver.start("plan", staged=True, timeout_s=5)
    trainer.transport.bytes_per_s = 0.0
    assert isinstance(rank.wait().error, TransferTimeoutError)
    assert not rank.receiver.abort().lost
    return quarantined_bytes() - before


@pytest.fixture
def trainer() -> Iterator[SourceRank]:
    """A trainer that moves nothing."""
    with offered_tensors(hf_tensors(seed=1)) as made:
        yield made


@pytest.fixture
def lost(rank: InMemoryRank, trainer: SourceRank) -> int:
    """What a pull from it has cost the rank."""
    rank.receiver.connect("plan", [trainer.manifest])
    trainer.transport.bytes_per_s = 0.0
    held = lose(rank, trainer)
    assert held == rank.receiver.quarantined_bytes > 0
    return held


def test_memory_comes_back_when_the_peer_is_known_to_be_dead(
    rank: InMemoryRank, trainer: SourceRank, lost: int
) -> None:
    trainer.transport.close()
    assert rank.receiver.staging_room("plan").quarantined_bytes == quarantined_bytes() == 0
    assert len(rank.transports) == 1


def test_memory_comes_back_when_the_reads_end_after_all(
    rank: InMemoryRank, trainer: SourceRank, lost: int
) -> None:
    """The trainer was only stopped."""
    assert rank.receiver.staging_room("plan").quarantined_bytes == lost
    trainer.transport.bytes_per_s = None
    assert rank.receiver.staging_room("plan").quarantined_bytes == 0


def test_a_source_that_lost_us_memory_is_asked_before_it_may_again(
    rank: InMemoryRank, trainer: SourceRank, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Update after update against a stopped trainer costs one buffer, and a few bytes each."""
    monkeypatch.setattr(meeting, "PATIENCE_S", (0.02,))
    for staged in (False, True, False):
        with pytest.raises(TransferTimeoutError, match=trainer.manifest.agent):
            rank.receiver.start("plan", staged=staged, timeout_s=5)
    assert quarantined_bytes() < lost + 4 * meeting.GREETING_BYTES
    trainer.transport.bytes_per_s = None
    rank.receiver.start("plan", staged=True, timeout_s=5)
    rank.install_all()
    assert rank.serves(seed=1)
    assert quarantined_bytes() < lost + 4 * meeting.GREETING_BYTES


def test_memory_comes_back_although_its_peer_was_forgotten(
    rank: InMemoryRank, trainer: SourceRank, lost: int
) -> None:
    """A sender that is stopped is dropped, and killed later: the reads say nothing by then."""
    rank.receiver.drop("plan")
    rank.receiver.let_go(lost=False)
    assert quarantined_bytes() == lost
    trainer.transport.close()
    rank.receiver.let_go(lost=False)
    assert quarantined_bytes() == 0


def test_no_more_is_staged_where_as_much_is_lost(rank: InMemoryRank, lost: int) -> None:
    """What could not be had back bounds what may be lost next."""
    room = rank.receiver.staging_room("plan")
    assert room.quarantined_bytes >= room.wanted_bytes
    with pytest.raises(UnsupportedError, match="lost to earlier pulls") as caught:
        choose_mode("staged", [room], None)
    assert "in place" in caught.value.remedy
    assert choose_mode("auto", [room], None).staged is False


def test_what_trainers_may_write_to_comes_back_when_they_are_gone(rank: InMemoryRank) -> None:
    """One of this host may write past our agent: another agent is no proof."""
    with offered_tensors(hf_tensors(seed=1)) as trainer:
        rank.receiver.connect("plan", [trainer.manifest], direction="push")
        rank.receiver.start("plan", staged=True, timeout_s=5)
        rank.receiver.abort(writes_ended=False)
        assert (lost := quarantined_bytes()) > 0
        rank.receiver.let_go(lost=False)
        assert quarantined_bytes() == lost
        trainer.transport.close()
        rank.receiver.let_go(lost=False)
        assert quarantined_bytes() == 0
