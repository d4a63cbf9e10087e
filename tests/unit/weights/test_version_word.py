"""A source that takes its offer back: what was read of it is not installed, whoever reads late."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator

import msgspec
import pytest

from engine_plugins.errors import PeerError, SourceRevokedError
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.contract.version_word import CLOSED, VersionWord, new_word
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.in_memory_model import InMemoryModel, hf_tensors
from tests.support.in_memory_rank import InMemoryRank
from tests.support.source_ranks import SourceRank, offered_tensors

LAYERS = 6


@pytest.fixture
def rank() -> Iterator[InMemoryRank]:
    """A rank that serves the weights of seed 0, and may be landed in once it was proven."""
    model = InMemoryModel.loaded(hf_tensors(seed=0, layers=LAYERS))
    made = InMemoryRank(model, direct_landing=True)
    yield made
    made.close()


@pytest.fixture
def trainer() -> Iterator[SourceRank]:
    """A trainer that offers the weights of seed 1."""
    with offered_tensors(hf_tensors(seed=1, layers=LAYERS)) as made:
        yield made


def begun(rank: InMemoryRank, trainer: SourceRank, *, staged: bool, word: int | None) -> None:
    """An update in the middle of its reads, which go on by and by."""
    rank.receiver.connect("plan", [trainer.manifest])
    trainer.transport.bytes_per_s = trainer.source.nbytes / 2
    rank.receiver.start("plan", staged=staged, timeout_s=20, word=word)
    until = time.monotonic() + 5
    while not rank.receiver.poll().bytes_done:
        assert time.monotonic() < until
        time.sleep(0.001)


def offered(trainer: SourceRank) -> int:
    """A word that the trainer has set for an update."""
    word = new_word()
    trainer.source.offer(word)
    return word


def proven(rank: InMemoryRank, trainer: SourceRank) -> None:
    """The first update, after which bytes land in live parameters."""
    rank.receiver.connect("plan", [trainer.manifest])
    rank.receiver.start("plan", staged=False, timeout_s=10)
    rank.install_all()
    assert rank.serves(seed=1)


@pytest.mark.parametrize("told", [True, False])
def test_a_staged_update_that_is_revoked_in_the_middle_leaves_the_old_weights(
    rank: InMemoryRank, trainer: SourceRank, told: bool
) -> None:
    """The trainer changes its word, then its weights; the reads go on, and find a mixture.

    Also where the caller did not say what the word must be.
    """
    begun(rank, trainer, staged=True, word=offered(trainer) if told else None)
    trainer.source.revoke()
    trainer.hold(hf_tensors(seed=2, layers=LAYERS))
    trainer.transport.bytes_per_s = None
    error = rank.wait().error
    assert isinstance(error, SourceRevokedError)
    for said in ("rank 0: ", "trainer rank 0", "took the offer", "not installed"):
        assert said in error.message
    aborted = rank.receiver.abort()
    assert (aborted.wrote, aborted.lost) == (False, False)
    assert rank.serves(seed=0)
    rank.receiver.start("plan", staged=True, timeout_s=10, word=offered(trainer))
    rank.install_all()
    assert rank.serves(seed=2)


def test_live_weights_that_were_mixed_are_told_and_the_next_update_mends_them(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """Landed in place; bytes that were read whole do not excuse those that were not."""
    proven(rank, trainer)
    rank.receiver.start("plan", staged=False, timeout_s=20, word=offered(trainer))
    until = time.monotonic() + 5
    while not rank.receiver.poll().may_begin:
        assert time.monotonic() < until
        time.sleep(0.001)
    trainer.source.revoke()
    trainer.hold(hf_tensors(seed=2, layers=LAYERS))
    with pytest.raises(SourceRevokedError):
        rank.install_all()
    aborted = rank.receiver.abort()
    assert (aborted.wrote, aborted.lost) == (True, False)
    rank.receiver.start("plan", staged=False, timeout_s=10, word=offered(trainer))
    rank.install_all()
    assert rank.serves(seed=2)


@pytest.mark.parametrize("direct", [True, False])
def test_a_request_that_comes_late_is_refused_before_anything_is_touched(
    rank: InMemoryRank, trainer: SourceRank, direct: bool
) -> None:
    """A proxy may have held it while its sender gave up and went on to the next version."""
    if direct:
        proven(rank, trainer)
    else:
        rank.receiver.connect("plan", [trainer.manifest])
    late = offered(trainer)
    offered(trainer)
    trainer.hold(hf_tensors(seed=2, layers=LAYERS))
    rank.receiver.start("plan", staged=False, timeout_s=10, word=late)
    status = rank.wait()
    assert isinstance(status.error, SourceRevokedError)
    assert (status.steps_ready, status.may_begin) == (0, False)
    assert not rank.receiver.abort().wrote
    assert rank.serves(seed=1 if direct else 0)


def test_a_word_that_moves_before_the_version_is_published_refuses_it(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """A trainer that died by then is no such thing: every byte was found whole already."""
    rank.receiver.connect("plan", [trainer.manifest])
    for end, published in ((trainer.source.revoke, False), (trainer.transport.close, True)):
        rank.receiver.start("plan", staged=True, timeout_s=10, word=offered(trainer))
        rank.wait()
        while (status := rank.receiver.advance(budget_s=1)).steps_installed < status.steps_total:
            pass
        end()
        if published:
            rank.receiver.finish()
        else:
            with pytest.raises(SourceRevokedError, match="before the version was published"):
                rank.receiver.finish()
            rank.receiver.abort()
    assert rank.serves(seed=1)


def test_a_word_that_cannot_be_read_after_the_last_byte_proves_nothing(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """Its memory may have been written to before it was taken back."""
    begun(rank, trainer, staged=True, word=None)
    word = trainer.source._word
    assert word is not None
    trainer.transport.deregister(word.address)
    trainer.transport.bytes_per_s = None
    error = rank.wait().error
    assert isinstance(error, PeerError)
    assert "nothing shows that what was read before is of one version" in error.message
    assert not rank.receiver.abort().wrote


def test_an_engine_that_feeds_others_revokes_before_it_is_written_to(
    rank: InMemoryRank, trainer: SourceRank
) -> None:
    """Its offer holds until the next update begins to write."""
    proven(rank, trainer)
    word = new_word()
    offer = msgspec.msgpack.decode(rank.receiver.manifest({}, word), type=SourceManifest)
    assert ctypes.c_uint64.from_address(offer.version_word).value == word
    rank.receiver.start("plan", staged=False, timeout_s=10)
    rank.install_all()
    assert ctypes.c_uint64.from_address(offer.version_word).value == CLOSED


def test_a_page_is_used_again_and_never_unmapped() -> None:
    """A late reader of it finds another number, or none that it was told."""
    transport = InMemoryTransport("trainer")
    words = [VersionWord(transport) for _ in range(2)]
    addresses = {word.address for word in words}
    for word in words:
        word.set(new_word())
        word.close()
        word.close()
        assert ctypes.c_uint64.from_address(word.address).value == CLOSED
    assert {VersionWord(transport).address for _ in range(2)} == addresses
    transport.close()
