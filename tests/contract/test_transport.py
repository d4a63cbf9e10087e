"""The contract of a transport, on every wire; NIXL's peers are real processes."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import cast

import numpy as np
import pytest

from engine_plugins.errors import (
    PeerError,
    PeerLostError,
    TransferTimeoutError,
    TransportError,
)
from engine_plugins.weights.transport.base import Direction, Transport
from engine_plugins.weights.transport.nixl import NixlTransport
from engine_plugins.weights.transport.transfers import MAX_IN_FLIGHT, run_transfers
from tests.support.nixl_peer import pattern
from tests.support.wires import WIRES, Flow, NixlWire, Peer, Target, Wire

pytestmark = pytest.mark.core

KIB = 1 << 10
ALL_WIRES = sorted(WIRES)
DIRECTIONS: list[Direction] = ["read", "write"]


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


@pytest.fixture(params=DIRECTIONS)
def direction(request: pytest.FixtureRequest) -> Direction:
    """Each way that bytes can go."""
    return cast(Direction, request.param)


def meet(engine: Transport, wire: Wire, agent: str, *, nbytes: int = 64 * KIB, seed: int) -> Peer:
    peer = wire.peer(agent, nbytes, seed)
    engine.add_peer(agent, peer.metadata)
    return peer


def test_bytes_arrive_exactly_and_nothing_else_is_touched(
    wire: Wire, engine: Transport, direction: Direction
) -> None:
    """Odd lengths, gaps on both sides, rows out of order: every other byte stays 0xFF.

    Then the same prepared transfer is run again, and brings what the giving end holds by then.
    """
    peer = meet(engine, wire, "trainer", seed=1)
    flow = Flow(direction, engine, peer, 96 * KIB)
    rows = [(5, 11, 1), (4096, 0, 8191), (64_001, 63 * KIB, 1024), (13, 30_011, 4001)]
    transfer = flow.prepare(rows)
    assert transfer.direction == direction
    assert (transfer.peer, transfer.nbytes) == ("trainer", 1 + 8191 + 1024 + 4001)

    for seed in (1, 2, 3):
        flow.begin(seed)
        assert run_transfers([transfer], deadline_s=20) == transfer.nbytes
        assert np.array_equal(flow.received(), flow.expected(seed, rows))
    transfer.release()
    transfer.release()
    with pytest.raises(TransportError, match=f"this {direction} "):
        transfer.post()


def test_what_is_done_is_there(wire: Wire, engine: Transport, direction: Direction) -> None:
    """Many small scattered rows: once `done` is true, not one byte is still on its way.

    A written peer's memory is looked at by way of the kernel, with no word to the peer between.
    """
    count, size = 3000, 96
    peer = meet(engine, wire, "trainer", nbytes=count * 128, seed=1)
    flow = Flow(direction, engine, peer)
    places = np.random.default_rng(0).permutation(count).tolist()
    rows = [(here * 128 + 7, there * 128, size) for here, there in enumerate(places)]
    transfer = flow.prepare(rows)
    for seed in range(4):
        flow.begin(seed)
        expected = flow.expected(seed, rows)
        until = time.monotonic() + 20
        transfer.post()
        while not transfer.done():
            assert time.monotonic() < until
        assert np.array_equal(flow.received(), expected)
    transfer.release()


def test_many_transfers_of_several_peers_run_in_one_call(
    wire: Wire, engine: Transport, direction: Direction
) -> None:
    """More than are posted at a time, with three peers, and progress up to the total."""
    size = 5001
    rows = [(n * 6000, n * size, size) for n in range(MAX_IN_FLIGHT // 2)]
    flows = []
    for index in range(3):
        peer = meet(engine, wire, f"trainer-{index}", nbytes=256 * KIB, seed=index)
        flows.append(Flow(direction, engine, peer))
        flows[-1].begin(index)
    transfers = [flow.prepare([row]) for flow in flows for row in rows]
    seen: list[tuple[int, int]] = []

    total = run_transfers(transfers, deadline_s=20, on_progress=lambda *done: seen.append(done))

    assert total == len(transfers) * size
    assert seen == [(n * size, total) for n in range(1, len(transfers) + 1)]
    for index, flow in enumerate(flows):
        assert np.array_equal(flow.received(), flow.expected(index, rows))


def test_reads_and_writes_run_in_one_call(wire: Wire, engine: Transport) -> None:
    """One peer gives to us while another one is given to."""
    giver, taker = (
        Flow(direction, engine, meet(engine, wire, f"{direction}-peer", seed=1))
        for direction in DIRECTIONS
    )
    row = [(0, 0, 64 * KIB)]
    for flow in (giver, taker):
        flow.begin(5)
    assert run_transfers([giver.prepare(row), taker.prepare(row)], deadline_s=20) == 128 * KIB
    for flow in (giver, taker):
        assert np.array_equal(flow.received(), pattern(64 * KIB, 5))


def test_memory_that_nobody_registered_is_refused(
    wire: Wire, engine: Transport, direction: Direction
) -> None:
    """Neither side's range may lie outside its regions, not by one byte; the peer is named."""
    peer = meet(engine, wire, "trainer", seed=1)
    flow = Flow(direction, engine, peer, 4 * KIB)
    for rows in (
        [(0, 0, 16), (0, peer.nbytes - 1, 2)],
        [(0, peer.nbytes + (1 << 24), 8)],
        [(4 * KIB - 1, 0, 2)],
        [(1 << 24, 0, 8)],
        [(0, 2**64 - 8 - peer.address, 16)],
    ):
        with pytest.raises(PeerError, match=r"trainer|engine"):
            flow.prepare(rows)
    prepare = engine.prepare_read if direction == "read" else engine.prepare_write
    with pytest.raises(PeerError, match="stranger"):
        prepare("stranger", np.ones((1, 3), dtype=np.uint64), local_device=-1, remote_device=-1)
    for empty in ([], [(0, 0, 8), (8, 8, 0)]):
        with pytest.raises(TransportError, match="at least one byte"):
            flow.prepare(empty)
    assert run_transfers([flow.prepare([(0, 0, 4 * KIB)])], deadline_s=20) == 4 * KIB


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
    wire: Wire, engine: Transport, direction: Direction
) -> None:
    """Killed after use: lost before the deadline, every time. Its successor bears its name."""
    row = [(0, 0, 64 * KIB)]
    flow = Flow(direction, engine, meet(engine, wire, "trainer", seed=1))
    transfer = flow.prepare(row)
    run_transfers([transfer], deadline_s=20)
    flow.peer.kill()
    for _ in range(2):
        with pytest.raises(PeerLostError, match=r"trainer.*0 of 65536 bytes"):
            run_transfers([transfer], deadline_s=20)

    again = Flow(direction, engine, meet(engine, wire, "trainer", seed=1))
    again.begin(7)
    with pytest.raises(PeerError, match=rf"trainer.*met again after this {direction}"):
        transfer.post()
    transfer.release()
    run_transfers([again.prepare(row)], deadline_s=20)
    assert np.array_equal(again.received(), pattern(64 * KIB, 7))


def test_a_peer_that_died_before_the_first_contact_is_lost(
    wire: Wire, engine: Transport, direction: Direction
) -> None:
    """Whether it died before it was met or after: lost before the deadline, and never a hang."""
    early = wire.peer("early", 4 * KIB, 1)
    early.kill()
    with pytest.raises(PeerLostError, match="early"):
        engine.add_peer("early", early.metadata)
    late = Flow(direction, engine, meet(engine, wire, "late", nbytes=4 * KIB, seed=1))
    late.peer.kill()
    with pytest.raises(PeerLostError, match="late"):
        run_transfers([late.prepare([(0, 0, 4 * KIB)])], deadline_s=20)


def test_a_peer_killed_in_mid_transfer_is_lost_while_others_end(
    wire: Wire, engine: Transport, direction: Direction
) -> None:
    """Killed while it is waited for: lost at once, and what the healthy peer had to do is done."""
    healthy, doomed = (
        Flow(direction, engine, meet(engine, wire, agent, nbytes=1 << 20, seed=1))
        for agent in ("healthy", "doomed")
    )
    healthy.begin(1)
    transfers = [
        flow.prepare([(at, at, 64 * KIB)])
        for at in range(0, 1 << 20, 64 * KIB)
        for flow in (healthy, doomed)
    ]
    doomed.peer.stop()
    killer = threading.Timer(0.3, doomed.peer.kill)
    killer.start()
    with pytest.raises(PeerLostError, match=r"doomed.* 1048576 of 2097152 bytes had arrived"):
        run_transfers(transfers, deadline_s=20)
    killer.join()
    assert np.array_equal(healthy.received(), pattern(1 << 20, 1))
    seen = doomed.target.bytes.copy()
    time.sleep(0.2)
    assert np.array_equal(doomed.target.bytes, seen)


def test_a_stopped_peer_ends_in_a_timeout_of_ours(
    wire: Wire, engine: Transport, direction: Direction
) -> None:
    """No wire gives up by itself. The text names the peer and the bytes; late bytes do land."""
    row = [(0, 0, 1 << 20)]
    peer = meet(engine, wire, "trainer", nbytes=1 << 20, seed=1)
    flow = Flow(direction, engine, peer)
    flow.begin(1)
    peer.stop()
    began = time.monotonic()
    named = rf"trainer: 0 of 1048576 bytes .*1 {direction}s are still under way"
    with pytest.raises(TransferTimeoutError, match=named):
        run_transfers([flow.prepare(row)], deadline_s=0.5)
    assert time.monotonic() - began > 0.4
    peer.resume()
    fresh = Flow(direction, engine, peer)
    fresh.begin(2)
    run_transfers([fresh.prepare(row)], deadline_s=20)
    assert np.array_equal(fresh.received(), pattern(1 << 20, 2))


def test_a_peer_that_closes_its_agent_is_lost(
    wire: Wire, engine: Transport, direction: Direction
) -> None:
    """Closing is an orderly death; afterwards nothing can be prepared from that meeting."""
    flow = Flow(direction, engine, meet(engine, wire, "trainer", nbytes=4 * KIB, seed=1))
    transfer = flow.prepare([(0, 0, 4 * KIB)])
    run_transfers([transfer], deadline_s=20)
    flow.peer.close_agent()
    with pytest.raises(PeerLostError, match="trainer"):
        run_transfers([transfer], deadline_s=5)
    with pytest.raises(PeerLostError, match="trainer"):
        flow.prepare([(0, 0, 8)])
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
    wire: Wire, engine: Transport, direction: Direction
) -> None:
    """Prepared transfers and regions go with the agent."""
    peer = meet(engine, wire, "trainer", nbytes=4 * KIB, seed=1)
    flow = Flow(direction, engine, peer)
    transfer = flow.prepare([(0, 0, 4 * KIB)])
    run_transfers([transfer], deadline_s=20)
    engine.close()
    engine.close()
    transfer.release()
    for use in (
        engine.metadata,
        transfer.post,
        lambda: engine.add_peer("trainer", peer.metadata),
        lambda: engine.register(flow.target.address, 8, -1),
        lambda: flow.prepare([(0, 0, 8)]),
    ):
        with pytest.raises(TransportError):
            use()


def test_what_has_begun_is_not_ended_by_releasing_it(
    monkeypatch: pytest.MonkeyPatch, direction: Direction
) -> None:
    """Why timed-out memory is quarantined, at either end: over tcp bytes land after the release."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    with closing(NixlWire()) as wire:
        engine = wire.transport("engine")
        peer = meet(engine, wire, "trainer", nbytes=1 << 20, seed=1)
        flow = Flow(direction, engine, peer)
        transfer = flow.prepare([(0, 0, 1 << 20)])
        run_transfers([transfer], deadline_s=20)
        flow.begin(2)
        peer.stop()
        with pytest.raises(TransferTimeoutError):
            run_transfers([transfer], deadline_s=0.2)
        transfer.release()
        peer.resume()
        until = time.monotonic() + 10
        source = pattern(1 << 20, 2)
        while not np.array_equal(flow.received(), source) and time.monotonic() < until:
            time.sleep(0.01)
        assert np.array_equal(flow.received(), source)


def test_a_forgotten_peer_leaves_no_socket_behind(wire: Wire, engine: Transport) -> None:
    """Senders come and go under new names, and their process lives on."""
    target = Target(engine, 64 * KIB)
    for number in range(3):
        peer = wire.peer(f"trainer-{number}", 64 * KIB, number)
        before = len(os.listdir("/proc/self/fd"))
        engine.add_peer(peer.agent, peer.metadata)
        read = target.read(peer, [(0, 0, 64 * KIB)])
        assert run_transfers([read], deadline_s=20) == 64 * KIB
        read.release()
        engine.remove_peer(peer.agent)
        peer.close_agent()
        until = time.monotonic() + 5
        while len(os.listdir("/proc/self/fd")) > before:
            assert time.monotonic() < until, "a socket or pipe of this peer is still open"
            time.sleep(0.01)


def test_a_transfer_that_nobody_holds_is_given_back(
    wire: Wire, engine: Transport, direction: Direction
) -> None:
    """As an error on the way drops it: the wire holds no more transfers than we do."""
    peer = meet(engine, wire, "trainer", seed=1)
    flow = Flow(direction, engine, peer)
    if not isinstance(engine, NixlTransport):
        return  # nothing is kept for it beyond the object
    given_back: list[int | None] = []
    plain = engine._release

    def noting(request: int | None, lists: list[int]) -> None:
        given_back.append(request)
        plain(request, lists)

    engine._release = noting  # type: ignore[method-assign]
    held = [flow.prepare([(row * 64, row * 64, 64)]) for row in range(8)]
    for transfer in held[:4]:
        transfer.release()
        transfer.release()
    del held, transfer
    gc.collect()
    assert len(given_back) == len(set(given_back)) == 8
