"""Small neighbours are written as one range, with the bytes that they have at that moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from engine_plugins.sender.peer_writes import PeerWrites
from engine_plugins.sender.small_writes import GATHERED_BYTES
from engine_plugins.weights.transport.base import Descriptors
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from engine_plugins.weights.transport.transfers import MOST_DESCRIPTORS, run_transfers

HERE, THERE = 1 << 20, 1 << 20


class Ends:
    """A trainer's memory and an engine rank's, and a wire between them."""

    def __init__(self) -> None:
        self.trainer, self.engine = InMemoryTransport("trainer"), InMemoryTransport("engine")
        self.ours = torch.randint(0, 256, (HERE,), dtype=torch.uint8)
        self.theirs = torch.zeros(THERE, dtype=torch.uint8)
        self.trainer.register(self.ours.data_ptr(), HERE, -1)
        self.engine.register(self.theirs.data_ptr(), THERE, -1)
        self.trainer.add_peer("engine", self.engine.metadata())

    def rows(self, pieces: Sequence[tuple[int, int, int]]) -> Descriptors:
        """Ranges from offsets: here, there, bytes."""
        base = np.array([self.ours.data_ptr(), self.theirs.data_ptr(), 0], dtype=np.uint64)
        return np.array(pieces, dtype=np.uint64) + base

    def expected(self, pieces: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        memory = torch.zeros(THERE, dtype=torch.uint8)
        for here, there, size in pieces:
            memory[there : there + size] = self.ours[here : here + size]
        return memory


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.trainer.close()
    made.engine.close()


CASES = {
    "neighbours there, apart here": ([(900, 0, 10), (50, 10, 7), (300, 17, 100)], 3, 1),
    "told in another order": ([(300, 17, 100), (900, 0, 10), (50, 10, 7)], 3, 1),
    "a gap there": ([(900, 0, 10), (50, 11, 7)], 0, 2),
    "neighbours at both ends": ([(100, 0, 10), (110, 10, 7)], 0, 2),
    "one is large": ([(9000, 0, GATHERED_BYTES + 1), (50, GATHERED_BYTES + 1, 7)], 0, 2),
    "as large as may be": ([(9000, 0, GATHERED_BYTES), (50, GATHERED_BYTES, 7)], 2, 1),
    "two groups": ([(9, 0, 4), (99, 4, 4), (999, 100, 4), (70, 104, 4), (80, 500, 9)], 4, 3),
}


@pytest.mark.parametrize("case", list(CASES))
def test_which_pieces_are_gathered(ends: Ends, case: str) -> None:
    """Twice, with other bytes the second time."""
    pieces, gathered, ranges = CASES[case]
    writes = PeerWrites("rank 0", "engine", ends.trainer)
    writes.add(ends.rows(pieces), local_device=-1, remote_device=-1)
    assert (writes.gathered, writes.ranges) == (gathered, ranges)
    for _ in range(2):
        ends.ours.random_(0, 256)
        writes.begin()
        assert writes.unfinished
        run_transfers(writes.writes, deadline_s=10)
        assert not writes.unfinished
        assert torch.equal(ends.theirs, ends.expected(pieces))
    writes.release(ended=True)


def test_many_ranges_are_several_writes(ends: Ends) -> None:
    """What is under way at once stays bounded; progress counts what ended."""
    pieces = [(16 * n, 32 * n, 8) for n in range(2 * MOST_DESCRIPTORS + 1)]
    writes = PeerWrites("rank 1 of http://e", "engine", ends.trainer)
    writes.add(ends.rows(pieces), local_device=-1, remote_device=-1)
    writes.begin()
    total = 8 * len(pieces)
    assert writes.progress() == f"rank 1 of http://e: 0 of 3 writes, 0 of {total} bytes"
    run_transfers(writes.writes[:1], deadline_s=10)
    done = writes.writes[0].nbytes
    assert writes.progress() == f"rank 1 of http://e: 1 of 3 writes, {done} of {total} bytes"
    run_transfers(writes.writes[1:], deadline_s=10)
    assert torch.equal(ends.theirs, ends.expected(pieces))
    writes.release(ended=True)
