"""The contract of a transport, on every wire; NIXL's peers are real processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from engine_plugins.errors import (
    PeerError,
    PeerLostError,
    TransferTimeoutError,
    TransportError,
)
from engine_plugins.weights.transport.base import Transport
from engine_plugins.weights.transport.reads import MAX_IN_FLIGHT, run_reads
from tests.support.nixl_peer import pattern
from tests.support.wires import WIRES, NixlWire, Peer, Target, Wire

KIB = 1 << 10
ALL_WIRES = sorted(WIRES)


@pytest.fixture(params=ALL_WIRES)
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """A wire of each kind; UCX reads its environment for every agent anew."""
    if request.param == "nixl_tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    else:
        monkeypatch.delenv("UCX_TLS", raising=False)
    made = WIRES[request.param]()
    yield made
    made.close()


@pytest.fixture
def engine(wire: Wire) -> Transport:
    """The transport of this process."""
    return wire.transport("engine")


def meet(engine: Transport, wire: Wire, agent: str, *, nbytes: int = 64 * KIB, seed: int) -> Peer:
    peer = wire.peer(agent, nbytes, seed)
    engine.add_peer(agent, peer.metadata)
    return peer


def test_bytes_arrive_exactly_and_nothing_else_is_touched(wire: Wire, engine: Transport) -> None:
    """Odd lengths, gaps on both sides, rows out of order: every other byte stays 0xFF.

    Then the same prepared read is run again, and brings what the source holds by then.
    """
    peer = meet(engine, wire, "trainer", seed=1)
    target = Target(engine, 96 * KIB)
    rows = [(5, 11, 1), (4096, 0, 8191), (64_001, 63 * KIB, 1024), (13, 30_011, 4001)]
    read = target.read(peer, rows)
    assert (read.peer, read.nbytes) == ("trainer", 1 + 8191 + 1024 + 4001)

    for seed in (1, 2, 3):
        peer.fill(seed)
        source = pattern(peer.nbytes, seed)
        expected = np.full(96 * KIB, 0xFF, dtype=np.uint8)
        for local, remote, length in rows:
            expected[local : local + length] = source[remote : remote + length]
        assert run_reads([read], deadline_s=20) == read.nbytes
        assert np.array_equal(target.bytes, expected)
    read.release()
    read.release()
    with pytest.raises(TransportError):
        read.post()


def test_many_reads_of_several_peers_run_in_one_call(wire: Wire, engine: Transport) -> None:
    """More reads than are posted at a time, from three peers, with progress up to the total."""
    peers = [meet(engine, wire, f"trainer-{i}", nbytes=256 * KIB, seed=i) for i in range(3)]
    target = Target(engine, 3 * 256 * KIB)
    size = 5001
    reads, expected = [], np.full(target.bytes.size, 0xFF, dtype=np.uint8)
    for index, peer in enumerate(peers):
        source = pattern(peer.nbytes, index)
        for number in range(MAX_IN_FLIGHT // 2):
            at = index * peer.nbytes + number * 6000
            reads.append(target.read(peer, [(at, number * size, size)]))
            expected[at : at + size] = source[number * size : (number + 1) * size]
    seen: list[tuple[int, int]] = []

    total = run_reads(reads, deadline_s=20, on_progress=lambda *done: seen.append(done))

    assert total == len(reads) * size
    assert seen == [(n * size, total) for n in range(1, len(reads) + 1)]
    assert np.array_equal(target.bytes, expected)


def test_memory_that_nobody_registered_is_refused(wire: Wire, engine: Transport) -> None:
    """Neither side's range may lie outside its regions, not by one byte; the peer is named."""
    peer = meet(engine, wire, "trainer", seed=1)
    target = Target(engine, 4 * KIB)
    for rows in (
        [(0, 0, 16), (0, peer.nbytes - 1, 2)],
        [(0, peer.nbytes + (1 << 24), 8)],
        [(4 * KIB - 1, 0, 2)],
        [(1 << 24, 0, 8)],
        [(0, 2**64 - 8 - peer.address, 16)],
    ):
        with pytest.raises(PeerError, match=r"trainer|engine"):
            target.read(peer, rows)
    with pytest.raises(PeerError, match="stranger"):
        engine.prepare_read(
            "stranger", np.ones((1, 3), dtype=np.uint64), local_device=-1, remote_device=-1
        )
    for empty in ([], [(0, 0, 8), (8, 8, 0)]):
        with pytest.raises(TransportError, match="at least one byte"):
            target.read(peer, empty)
    assert run_reads([target.read(peer, [(0, 0, 4 * KIB)])], deadline_s=20) == 4 * KIB


def test_metadata_of_another_agent_is_refused(wire: Wire, engine: Transport) -> None:
    """Garbage, somebody else's metadata, and our own name are all a peer's fault."""
    peer = wire.peer("trainer", 4 * KIB, 1)
    with pytest.raises(PeerError, match=r"impostor.*'trainer'"):
        engine.add_peer("impostor", peer.metadata)
    with pytest.raises(PeerError, match="trainer"):
        engine.add_peer("trainer", b"garbage" * 50)
    with pytest.raises(PeerError, match="engine"):
        engine.add_peer("engine", engine.metadata())
    engine.add_peer("trainer", peer.metadata)


def test_a_killed_peer_is_named_and_works_again_once_restarted(
    wire: Wire, engine: Transport
) -> None:
    """Killed after use: lost within 5 s, for every read. Its successor bears the same name."""
    peer = meet(engine, wire, "trainer", seed=1)
    target = Target(engine, 64 * KIB)
    read = target.read(peer, [(0, 0, 64 * KIB)])
    run_reads([read], deadline_s=20)
    peer.kill()
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(PeerLostError, match=r"trainer.*0 of 65536 bytes"):
            run_reads([read], deadline_s=20)
    assert time.monotonic() - began < 5

    again = meet(engine, wire, "trainer", seed=7)
    with pytest.raises(PeerError, match=r"trainer.*met again"):
        read.post()
    read.release()
    run_reads([target.read(again, [(0, 0, 64 * KIB)])], deadline_s=20)
    assert np.array_equal(target.bytes, pattern(64 * KIB, 7))


def test_a_peer_that_died_before_the_first_read_is_lost(wire: Wire, engine: Transport) -> None:
    """Whether it died before it was met or after: lost within 5 s, and never a hang."""
    target = Target(engine, 4 * KIB)
    began = time.monotonic()
    early = wire.peer("early", 4 * KIB, 1)
    early.kill()
    with pytest.raises(PeerLostError, match="early"):
        engine.add_peer("early", early.metadata)
    late = meet(engine, wire, "late", nbytes=4 * KIB, seed=1)
    late.kill()
    with pytest.raises(PeerLostError, match="late"):
        run_reads([target.read(late, [(0, 0, 4 * KIB)])], deadline_s=20)
    assert time.monotonic() - began < 10


def test_a_peer_killed_in_mid_read_is_lost_while_others_end(wire: Wire, engine: Transport) -> None:
    """Killed while its bytes are waited for: lost at once, and the healthy peer's reads ended."""
    healthy = meet(engine, wire, "healthy", nbytes=1 << 20, seed=1)
    doomed = meet(engine, wire, "doomed", nbytes=1 << 20, seed=2)
    target = Target(engine, 2 << 20)
    reads = [
        target.read(peer, [(index * (1 << 20) + at, at, 64 * KIB)])
        for at in range(0, 1 << 20, 64 * KIB)
        for index, peer in enumerate((healthy, doomed))
    ]
    doomed.stop()
    killer = threading.Timer(0.3, doomed.kill)
    killer.start()
    began = time.monotonic()
    with pytest.raises(PeerLostError, match=r"doomed.* 1048576 of 2097152 bytes had arrived"):
        run_reads(reads, deadline_s=20)
    assert 0.2 < time.monotonic() - began < 5
    killer.join()
    assert np.array_equal(target.bytes[: 1 << 20], pattern(1 << 20, 1))
    seen = target.bytes.copy()
    time.sleep(0.2)
    assert np.array_equal(target.bytes, seen)


def test_a_stopped_peer_ends_in_a_timeout_of_ours(wire: Wire, engine: Transport) -> None:
    """No wire gives up by itself. The text names the peer and the bytes; late bytes do land."""
    peer = meet(engine, wire, "trainer", nbytes=1 << 20, seed=1)
    target = Target(engine, 1 << 20)
    peer.stop()
    began = time.monotonic()
    with pytest.raises(TransferTimeoutError, match=r"trainer: 0 of 1048576 bytes .* under way"):
        run_reads([target.read(peer, [(0, 0, 1 << 20)])], deadline_s=0.5)
    assert 0.4 < time.monotonic() - began < 3
    peer.resume()
    fresh = Target(engine, 1 << 20)
    run_reads([fresh.read(peer, [(0, 0, 1 << 20)])], deadline_s=20)
    assert np.array_equal(fresh.bytes, pattern(1 << 20, 1))


def test_a_peer_that_closes_its_agent_is_lost(wire: Wire, engine: Transport) -> None:
    """Closing is an orderly death; afterwards nothing can be prepared from that meeting."""
    peer = meet(engine, wire, "trainer", nbytes=4 * KIB, seed=1)
    target = Target(engine, 4 * KIB)
    read = target.read(peer, [(0, 0, 4 * KIB)])
    run_reads([read], deadline_s=20)
    peer.close_agent()
    with pytest.raises(PeerLostError, match="trainer"):
        run_reads([read], deadline_s=5)
    with pytest.raises(PeerLostError, match="trainer"):
        target.read(peer, [(0, 0, 8)])
    engine.remove_peer("trainer")
    engine.remove_peer("trainer")


def test_registration_is_checked(wire: Wire, engine: Transport) -> None:
    """Overlaps and unknown addresses are refused; a region can be registered again."""
    buffer = np.zeros(8 * KIB, dtype=np.uint8)
    address = int(buffer.ctypes.data)
    engine.register(address, 4 * KIB, -1)
    for start, length in ((address, 4 * KIB), (address + 1, 1), (address - 8, 16)):
        with pytest.raises(TransportError, match="overlap"):
            engine.register(start, length, -1)
    engine.register(address + 4 * KIB, 4 * KIB, -1)
    engine.deregister(address)
    with pytest.raises(TransportError, match="no registered region"):
        engine.deregister(address)
    engine.register(address, 4 * KIB, -1)


def test_closing_twice_is_harmless_and_use_after_it_is_refused(
    wire: Wire, engine: Transport
) -> None:
    """Prepared reads and regions go with the agent."""
    peer = meet(engine, wire, "trainer", nbytes=4 * KIB, seed=1)
    target = Target(engine, 4 * KIB)
    read = target.read(peer, [(0, 0, 4 * KIB)])
    run_reads([read], deadline_s=20)
    engine.close()
    engine.close()
    read.release()
    for use in (
        engine.metadata,
        read.post,
        lambda: engine.add_peer("trainer", peer.metadata),
        lambda: engine.register(target.address, 8, -1),
        lambda: target.read(peer, [(0, 0, 8)]),
    ):
        with pytest.raises(TransportError):
            use()


def test_a_read_once_begun_is_not_ended_by_releasing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a timed-out buffer is quarantined: over tcp the bytes land after the release."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    wire = NixlWire()
    engine = wire.transport("engine")
    peer = meet(engine, wire, "trainer", nbytes=1 << 20, seed=1)
    target = Target(engine, 1 << 20)
    read = target.read(peer, [(0, 0, 1 << 20)])
    run_reads([read], deadline_s=20)
    target.bytes[:] = 0xFF
    peer.stop()
    with pytest.raises(TransferTimeoutError):
        run_reads([read], deadline_s=0.2)
    read.release()
    peer.resume()
    until = time.monotonic() + 10
    source = pattern(1 << 20, 1)
    while not np.array_equal(target.bytes, source) and time.monotonic() < until:
        time.sleep(0.01)
    assert np.array_equal(target.bytes, source)
    wire.close()
