"""What short rows cost: as descriptors, as NIXL's strided descriptors, or whole and cut locally.

A shard of a tensor in a peer's memory: rows of some bytes, each a pitch from the next, wanted
without gaps. Microseconds for each row, the local copy included; preparation is paid once per plan
and stands apart. The best of interleaved runs, short ones, since what is asked for is the cost of
an operation and a busy machine only adds to it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from rich.table import Table

from engine_plugins.weights.memory.arena import Arena
from engine_plugins.weights.transport import nixl
from engine_plugins.weights.transport.nixl import NixlTransport
from engine_plugins.weights.transport.transfers import run_transfers
from tests.support.nixl_peer import pattern
from tests.support.wires import NixlPeer, NixlWire

COUNT = 512
"""Rows that are fetched in one run, fewer where they would be more than `MOST_BYTES`."""
MOST_BYTES = 8 << 20
ROWS = (256, 1024, 4096, 8192, 16384, 32768, 65536)
PITCHES = (2, 8)
"""Bytes from row to row, in rows: a shard of two or of eight."""
SCRATCH_BYTES = 4 << 20
"""Whole rows come in pieces of so much, as a plan's do."""
DEADLINE_S = 60.0


class Way(Protocol):
    """One way to fetch the rows into an arena; `run` leaves them there."""

    def run(self) -> None: ...
    def close(self) -> None: ...


def row_cost(*, pairs: int) -> Table:
    """A table for CMA (UCX's own choice on one host) and for tcp."""
    table = Table(title=f"{COUNT} rows: us for each (to prepare it), best of {pairs}")
    columns = ("UCX_TLS", "row", "pitch", "descriptors", "strided", "whole rows", "whole / descr.")
    for column in columns:
        table.add_column(column, justify="right")
    for wires in (None, "tcp"):
        with _linked(wires) as (transport, peer):
            for row in ROWS:
                for pitch in PITCHES:
                    cells = _measure(transport, peer, row, row * pitch, pairs)
                    table.add_row(wires or "unset (CMA)", f"{row}", f"{pitch} rows", *cells)
    return table


@contextmanager
def _linked(wires: str | None) -> Iterator[tuple[NixlTransport, NixlPeer]]:
    os.environ.pop("UCX_TLS", None)
    if wires is not None:
        os.environ["UCX_TLS"] = wires
    wire = NixlWire()
    try:
        transport = wire.transport("bench")
        peer = wire.peer("rows", MOST_BYTES * max(PITCHES), 1)
        transport.add_peer(peer.agent, peer.metadata)
        yield transport, peer
    finally:
        wire.close()


def _measure(
    transport: NixlTransport, peer: NixlPeer, row: int, pitch: int, pairs: int
) -> list[str]:
    count = min(COUNT, MOST_BYTES // row)
    arena = Arena(count * row, transport)
    wanted = pattern(peer.nbytes, 1)[: count * pitch].reshape(-1, pitch)[:, :row]
    target = arena.tensor(0, (count * row,), torch.uint8)
    makers: dict[str, Callable[[], Way]] = {
        "descriptors": lambda: _Descriptors(transport, peer, arena, row, pitch),
        "strided": lambda: _Strided(transport, peer, arena, row, pitch),
        "whole": lambda: _Whole(transport, peer, arena, row, pitch),
    }
    prepared: dict[str, list[float]] = {name: [] for name in makers}
    fetched: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(pairs):
        for name, make in makers.items():
            began = time.perf_counter()
            way = make()
            prepared[name].append(time.perf_counter() - began)
            way.run()  # its scratch area becomes resident
            target.fill_(0xFF)
            began = time.perf_counter()
            way.run()
            fetched[name].append(time.perf_counter() - began)
            way.close()
            assert np.array_equal(target.numpy().reshape(-1, row), wanted), name
    arena.close()
    best = {name: min(each) for name, each in fetched.items()}
    cells = [
        f"{best[name] * 1e6 / count:.1f} ({min(prepared[name]) * 1e6 / count:.1f})"
        for name in makers
    ]
    return [*cells, f"{best['whole'] / best['descriptors']:.2f}"]


class _Descriptors:
    """A descriptor for each row."""

    def __init__(
        self, transport: NixlTransport, peer: NixlPeer, arena: Arena, row: int, pitch: int
    ) -> None:
        count = arena.nbytes // row
        rows = np.empty((count, 3), dtype=np.uint64)
        rows[:, 0] = arena.address + np.arange(count) * row
        rows[:, 1] = peer.address + np.arange(count) * pitch
        rows[:, 2] = row
        self._read = transport.prepare_read(peer.agent, rows, local_device=-1, remote_device=-1)

    def run(self) -> None:
        run_transfers([self._read], deadline_s=DEADLINE_S)

    def close(self) -> None:
        self._read.release()


class _Strided:
    """One strided descriptor on each side, straight from the bindings."""

    def __init__(
        self, transport: NixlTransport, peer: NixlPeer, arena: Arena, row: int, pitch: int
    ) -> None:
        bindings = nixl._bindings()
        self._bindings, self._agent = bindings, transport._nixl
        count = arena.nbytes // row
        places = (
            (bindings.NIXL_INIT_AGENT, arena.address, row),
            (peer.agent, peer.address, pitch),
        )
        self._lists = [
            self._agent.prepXferDlist(
                agent,
                bindings.DRAM_SEG,
                np.array([[address, row, 0, stride, count]], dtype=np.uint64),
            )
            for agent, address, stride in places
        ]
        every = np.arange(count, dtype=np.int32)
        local, remote = self._lists
        self._request = self._agent.makeXferReq(bindings.NIXL_READ, local, every, remote, every)

    def run(self) -> None:
        status = self._agent.postXferReq(self._request, b"")
        until = time.monotonic() + DEADLINE_S
        while status == self._bindings.NIXL_IN_PROG and time.monotonic() < until:
            time.sleep(0)
            status = self._agent.getXferStatus(self._request)
        assert status == self._bindings.NIXL_SUCCESS

    def close(self) -> None:
        self._agent.releaseXferReq(self._request)
        for handle in self._lists:
            self._agent.releasedDlistH(handle)


class _Whole:
    """Whole rows as one block, then one strided copy; in pieces that fit the scratch area.

    The copy is numpy's, of one thread: torch's, of two, waits for its other thread on a busy
    machine (20 ms for 4 MiB in place of 0.4).
    """

    def __init__(
        self, transport: NixlTransport, peer: NixlPeer, arena: Arena, row: int, pitch: int
    ) -> None:
        self._row, self._pitch = row, pitch
        self._target = arena.tensor(0, (arena.nbytes // row, row), torch.uint8).numpy()
        self._scratch = Arena(SCRATCH_BYTES, transport)
        self._rows_each = SCRATCH_BYTES // pitch
        self._reads = [
            transport.prepare_read(
                peer.agent,
                np.array(
                    [[self._scratch.address, peer.address + first * pitch, count * pitch]],
                    dtype=np.uint64,
                ),
                local_device=-1,
                remote_device=-1,
            )
            for first, count in self._pieces()
        ]

    def run(self) -> None:
        for read, (first, count) in zip(self._reads, self._pieces(), strict=True):
            run_transfers([read], deadline_s=DEADLINE_S)
            rows = self._scratch.tensor(0, (count, self._pitch), torch.uint8).numpy()
            self._target[first : first + count] = rows[:, : self._row]

    def close(self) -> None:
        for read in self._reads:
            read.release()
        self._scratch.close()

    def _pieces(self) -> list[tuple[int, int]]:
        total = len(self._target)
        starts = range(0, total, self._rows_each)
        return [(first, min(self._rows_each, total - first)) for first in starts]
