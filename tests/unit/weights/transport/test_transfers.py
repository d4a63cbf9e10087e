"""`run_transfers` with peers whose speed is known: deadlines, cancellation, and clean ends."""

from __future__ import annotations

import time
from itertools import count

import numpy as np
import pytest

from engine_plugins.errors import PeerLostError, TransferTimeoutError, TransportError
from engine_plugins.weights.transport import transfers as transfers_module
from engine_plugins.weights.transport.base import PreparedTransfer
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from engine_plugins.weights.transport.transfers import (
    LARGEST_TRANSFER_BYTES,
    MAX_IN_FLIGHT,
    MOST_DESCRIPTORS,
    run_transfers,
    transfers_of,
)
from tests.support.wires import InMemoryPeer, Target

KIB = 1 << 10


def reads_of(peers: list[InMemoryPeer], *, each: int) -> tuple[Target, list[PreparedTransfer]]:
    """`each` reads of 1 KiB of every peer, all of the first peer's first."""
    engine = InMemoryTransport("engine")
    target = Target(engine, len(peers) * each * KIB)
    prepared: list[PreparedTransfer] = []
    for index, peer in enumerate(peers):
        engine.add_peer(peer.agent, peer.metadata)
        prepared += [
            target.read(peer, [((index * each + n) * KIB, n * KIB, KIB)]) for n in range(each)
        ]
    return target, prepared


def test_nothing_to_read_is_no_error() -> None:
    assert run_transfers([], deadline_s=1) == 0


def test_the_timeout_names_the_slow_peers_and_what_had_arrived() -> None:
    """Peers that delivered are not blamed; the deadline covers the whole call."""
    quick, slow = InMemoryPeer("quick", 50 * KIB, 1), InMemoryPeer("slow", 50 * KIB, 2)
    _, prepared = reads_of([quick, slow], each=50)
    slow.stop()
    began = time.monotonic()
    with pytest.raises(TransferTimeoutError) as caught:
        run_transfers(prepared, deadline_s=0.2)
    assert 0.2 <= time.monotonic() - began < 8, "50 times 0.2 s would be a deadline for each"
    assert caught.value.message.startswith("slow: 51200 of 102400 bytes arrived in 0.2 s")
    assert "50 reads are still under way" in caught.value.message
    assert "never free or reuse" in caught.value.remedy


def test_the_timeout_says_which_way_the_bytes_went() -> None:
    """Writes alone are writes; a call of both kinds speaks of transfers."""
    peer = InMemoryPeer("trainer", 2 * KIB, 1)
    target, (read,) = reads_of([peer], each=1)
    write = target.transfer("write", peer, [(0, KIB, KIB)])
    peer.stop()
    for transfers, said in (([write], "1 writes are"), ([write, read], "2 transfers are")):
        with pytest.raises(TransferTimeoutError, match=f"trainer: 0 of .* {said} still under way"):
            run_transfers(transfers, deadline_s=0.05)
        peer.resume()
        assert all(transfer.done() for transfer in transfers)
        peer.stop()


def test_a_slow_peer_within_the_deadline_is_waited_for_without_burning_a_core() -> None:
    peer = InMemoryPeer("trainer", 4 * KIB, 1)
    target, prepared = reads_of([peer], each=4)
    peer.transport.bytes_per_s = KIB / 0.5
    began, cpu_began = time.monotonic(), time.thread_time()
    assert run_transfers(prepared, deadline_s=20) == 4 * KIB
    elapsed = time.monotonic() - began
    assert elapsed > 0.45
    assert time.thread_time() - cpu_began < 0.7 * elapsed
    assert not (target.bytes == 0xFF).all()


def test_a_transfer_that_hangs_is_looked_at_ever_more_rarely() -> None:
    """The engine's own thread waits for each look."""
    peer = InMemoryPeer("trainer", KIB, 1)
    _, (read,) = reads_of([peer], each=1)
    peer.stop()
    looks = count()
    with pytest.raises(TransferTimeoutError):
        run_transfers([read], deadline_s=0.5, drain_s=0.0, cancelled=lambda: next(looks) < 0)
    assert 20 <= next(looks) <= 500


def test_peers_take_turns() -> None:
    """However the reads are ordered, every peer's link is in use from the start."""
    peers = [InMemoryPeer(f"trainer-{n}", 8 * KIB, n) for n in range(3)]
    target, prepared = reads_of(peers, each=8)
    started: list[int] = []

    def note(done: int, total: int) -> None:
        blocks = target.bytes.reshape(3, 8, KIB)
        started.append(sum(bool((peer != 0xFF).any()) for peer in blocks))

    run_transfers(prepared, deadline_s=5, on_progress=note)
    assert started[:3] == [1, 2, 3]


def test_cancelling_ends_cleanly_when_nothing_is_under_way() -> None:
    """No more is posted once cancelled; the buffer is the caller's again."""
    peer = InMemoryPeer("trainer", 8 * KIB, 1)
    target, prepared = reads_of([peer], each=8)
    asked = count()
    with pytest.raises(TransportError, match=r"cancelled; 3072 of 8192 bytes") as caught:
        run_transfers(prepared, deadline_s=5, cancelled=lambda: next(asked) >= 3)
    assert type(caught.value) is TransportError
    assert (target.bytes[3 * KIB :] == 0xFF).all()


def test_cancelling_while_a_read_hangs_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be stopped, so the buffer is lost, and the class of the error says so."""
    monkeypatch.setattr(transfers_module, "DRAIN_S", 0.1)
    peer = InMemoryPeer("trainer", KIB, 1)
    _, prepared = reads_of([peer], each=1)
    peer.stop()
    began = time.monotonic()
    with pytest.raises(TransferTimeoutError, match=r"cancelled; then trainer: 0 of 1024 bytes"):
        run_transfers(prepared, deadline_s=20, cancelled=lambda: time.monotonic() > began + 0.1)
    assert time.monotonic() - began < 10


def test_a_lost_peer_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow healthy peer's read ends before the error is raised; a hanging one is a timeout."""
    slow, dead = InMemoryPeer("slow", KIB, 1), InMemoryPeer("dead", KIB, 2)
    target, prepared = reads_of([slow, dead], each=1)
    slow.transport.bytes_per_s = KIB / 0.3
    dead.kill()
    with pytest.raises(PeerLostError, match=r"dead: .* 1024 of 2048 bytes had arrived"):
        run_transfers(prepared, deadline_s=20)
    assert not (target.bytes[:KIB] == 0xFF).all()
    assert (target.bytes[KIB:] == 0xFF).all()

    monkeypatch.setattr(transfers_module, "DRAIN_S", 0.1)
    slow.stop()
    with pytest.raises(TransferTimeoutError, match=r"dead: .*then slow: 0 of 2048"):
        run_transfers(prepared, deadline_s=20)


def test_a_reads_own_memory_is_checked_when_it_runs() -> None:
    """In memory, what the peer deregistered since is refused; NIXL would read it."""
    peer = InMemoryPeer("trainer", KIB, 1)
    target, prepared = reads_of([peer], each=1)
    peer.transport.deregister(peer.address)
    with pytest.raises(TransportError, match="trainer"):
        run_transfers(prepared, deadline_s=5)
    assert np.all(target.bytes == 0xFF)


def test_a_deadline_lets_what_is_under_way_end() -> None:
    """A healthy peer's reads end, so the memory is the caller's again; no more are posted."""
    peer = InMemoryPeer("trainer", 100 * KIB, 1)
    target, prepared = reads_of([peer], each=100)
    peer.transport.bytes_per_s = KIB / 0.5
    with pytest.raises(TransferTimeoutError, match="past the deadline") as caught:
        run_transfers(prepared, deadline_s=0.1)
    assert not caught.value.stuck
    landed = (target.bytes != 0xFF).any()
    assert landed
    time.sleep(0.1)
    posted = [read for read in prepared if _ended(read)]
    assert len(posted) == MAX_IN_FLIGHT


def _ended(read: PreparedTransfer) -> bool:
    try:
        return read.done()
    except TransportError:  # never posted
        return False


def test_a_stall_means_that_nothing_moved() -> None:
    """Reads that end one by one for longer than the stall timeout are no stall."""
    peer = InMemoryPeer("trainer", 8 * KIB, 1)
    engine = InMemoryTransport("engine")
    target = Target(engine, 8 * KIB)
    engine.add_peer(peer.agent, peer.metadata)
    reads = [target.read(peer, [(0, 0, (n + 1) * KIB)]) for n in range(8)]
    peer.transport.bytes_per_s = KIB / 0.1  # read n ends after n * 0.1 s
    assert run_transfers(reads, deadline_s=20, stall_timeout_s=0.5) == 36 * KIB
    peer.stop()
    began = time.monotonic()
    with pytest.raises(TransferTimeoutError, match=r"the last of them 0\.\d s ago") as caught:
        run_transfers(reads[:1], deadline_s=20, stall_timeout_s=0.5, drain_s=0.1)
    assert 0.5 <= time.monotonic() - began < 3
    assert caught.value.stuck


def test_an_interrupt_leaves_nothing_under_way() -> None:
    """Ctrl-C: the caller goes on to use its memory."""
    peer = InMemoryPeer("trainer", 4 * KIB, 1)
    _, prepared = reads_of([peer], each=4)
    peer.transport.bytes_per_s = KIB / 0.3

    def interrupt() -> bool:
        raise KeyboardInterrupt

    asked = count()
    with pytest.raises(KeyboardInterrupt):
        run_transfers(prepared, deadline_s=20, cancelled=lambda: next(asked) >= 4 and interrupt())
    assert all(read.done() for read in prepared)


def test_no_more_is_under_way_than_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are bounded as well as transfers; one transfer always may be posted."""
    monkeypatch.setattr(transfers_module, "LEAST_BYTES_IN_FLIGHT", 3 * KIB)
    peer = InMemoryPeer("trainer", 8 * KIB, 1)
    _, prepared = reads_of([peer], each=8)
    peer.stop()
    with pytest.raises(TransferTimeoutError, match="3 reads are still under way"):
        run_transfers(prepared, deadline_s=0.05, drain_s=0.0)
    monkeypatch.setattr(transfers_module, "LEAST_BYTES_IN_FLIGHT", KIB // 2)
    peer.resume()
    _, prepared = reads_of([peer], each=8)
    assert run_transfers(prepared, deadline_s=5) == 8 * KIB


@pytest.mark.parametrize(
    "sizes",
    [
        [1],
        [LARGEST_TRANSFER_BYTES + 1],
        [3 * LARGEST_TRANSFER_BYTES, 5, 7],
        [16] * 300,
        [2**40 + 3],
    ],
)
def test_transfers_are_small_enough_to_be_seen_to_move(sizes: list[int]) -> None:
    """Long ranges are cut, many are spread; every byte is in one of them, in order."""
    rows = np.zeros((len(sizes), 3), np.uint64)
    rows[:, 2] = sizes
    rows[:, 0] = np.cumsum(rows[:, 2]) - rows[:, 2] + 100
    rows[:, 1] = rows[:, 0] * 2
    parts = transfers_of(rows)
    assert all(0 < part[:, 2].sum() <= LARGEST_TRANSFER_BYTES for part in parts)
    assert all(len(part) <= MOST_DESCRIPTORS for part in parts)
    joined = np.concatenate(parts)
    assert joined[:, 2].sum() == rows[:, 2].sum()
    ends = joined[:-1, 0] + joined[:-1, 2]
    assert (ends == joined[1:, 0]).all()
    at = np.searchsorted(rows[:, 0], joined[:, 0], side="right") - 1
    assert (joined[:, 1] - rows[at, 1] == joined[:, 0] - rows[at, 0]).all()
