"""The receive buffer: what it costs, what it gives out, and what a timeout makes of it."""

from __future__ import annotations

import logging
import mmap
import weakref
from pathlib import Path

import pytest
import torch

from engine_plugins.errors import TransportError, UnsupportedError
from engine_plugins.weights.memory.arena import Arena
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from engine_plugins.weights.transport.quarantine import quarantined_bytes, reclaim

MIB = 1 << 20


@pytest.fixture
def transport() -> InMemoryTransport:
    return InMemoryTransport("engine")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_memory_is_resident_only_once_written(transport: InMemoryTransport) -> None:
    """A staged update reserves a whole model's bytes long before they arrive."""
    before = resident_bytes()
    arena = Arena(512 * MIB, transport)
    assert arena.address % mmap.PAGESIZE == 0
    assert resident_bytes() - before < 16 * MIB
    arena.tensor(64 * MIB, (32 * MIB,), torch.uint8).fill_(1)
    assert 24 * MIB < resident_bytes() - before < 64 * MIB
    arena.close()
    assert resident_bytes() - before < 24 * MIB


def test_views_share_the_arenas_bytes(transport: InMemoryTransport) -> None:
    """Any dtype and shape, none of them copies; a scalar and an empty tensor are tensors too."""
    arena = Arena(4096, transport)
    view = arena.tensor(128, (3, 5), torch.bfloat16)
    assert view.data_ptr() == arena.address + 128
    view.copy_(torch.arange(15).view(3, 5))
    assert torch.equal(arena.tensor(128, (15,), torch.bfloat16), view.flatten())
    assert arena.tensor(4088, (), torch.float64).shape == ()
    assert arena.tensor(4096, (0, 7), torch.float32).shape == (0, 7)
    assert arena.tensor(1, (2,), torch.float8_e4m3fn).nbytes == 2
    arena.close()


@pytest.mark.parametrize(
    ("offset_bytes", "shape", "dtype"),
    [
        (4090, (2,), torch.float32),
        (-4, (1,), torch.float32),
        (2, (1,), torch.float32),
        (0, (4097,), torch.uint8),
        (0, (-1,), torch.uint8),
    ],
)
def test_views_outside_or_askew_are_refused(
    transport: InMemoryTransport, offset_bytes: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    arena = Arena(4096, transport)
    with pytest.raises(TransportError, match="4096 bytes"):
        arena.tensor(offset_bytes, shape, dtype)


def test_closing_deregisters_once_and_spares_views_still_held(
    transport: InMemoryTransport,
) -> None:
    """The second close does nothing; a view that somebody kept can still be read."""
    arena = Arena(4096, transport)
    address = arena.address
    view = arena.tensor(0, (4096,), torch.uint8).fill_(7)
    arena.close()
    arena.close()
    assert int(view.sum()) == 7 * 4096
    with pytest.raises(TransportError, match="closed"):
        arena.tensor(0, (1,), torch.uint8)
    with pytest.raises(TransportError, match="no registered region"):
        transport.deregister(address)
    assert arena.nbytes == 4096


def test_a_quarantined_arena_is_kept_and_never_used_again(
    transport: InMemoryTransport, caplog: pytest.LogCaptureFixture
) -> None:
    """Late bytes must land in memory that is nobody else's: allocated, registered, unused."""
    arena = Arena(8 * MIB, transport)
    address = arena.address
    with caplog.at_level(logging.WARNING):
        arena.quarantine()
        arena.quarantine()
    arena.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "0.008 GiB" in caplog.text
    assert quarantined_bytes(transport) == 8 * MIB
    with pytest.raises(TransportError, match="quarantined"):
        arena.tensor(0, (1,), torch.uint8)
    with pytest.raises(TransportError, match="quarantined"):
        _ = arena.address
    assert reclaim(transport) == 0
    transport.deregister(address)
    transport.close()


def test_a_quarantined_arena_is_freed_once_nothing_can_come_into_it(
    transport: InMemoryTransport,
) -> None:
    """When its transfers have ended, or with the agent that would bring the bytes."""
    before = resident_bytes()
    ended = [False]
    arenas = [Arena(64 * MIB, transport) for _ in range(3)]
    for arena in arenas:
        arena.tensor(0, (64 * MIB,), torch.uint8).fill_(1)
    address = arenas[0].address
    arenas[0].quarantine(lambda: ended[0])
    arenas[1].quarantine()
    arenas[2].quarantine(ends_with_agent=False)
    assert (reclaim(transport), quarantined_bytes(transport)) == (0, 192 * MIB)
    ended[0] = True
    assert (reclaim(transport), quarantined_bytes(transport)) == (64 * MIB, 128 * MIB)
    with pytest.raises(TransportError, match="no registered region"):
        transport.deregister(address)
    assert resident_bytes() - before < 160 * MIB
    transport.close()
    assert quarantined_bytes(transport) == 64 * MIB, "a peer may write past the agent"
    assert resident_bytes() - before < 96 * MIB


def test_registrations_go_before_their_memory(transport: InMemoryTransport) -> None:
    """Freed first, the range could be another's while peers still reach it."""
    arena = Arena(4096, transport)
    held = weakref.ref(arena._usable())
    seen: list[bool] = []
    taken_back = transport.deregister

    def deregister(address: int) -> None:
        seen.append(held() is not None)
        taken_back(address)

    transport.deregister = deregister  # type: ignore[method-assign]
    arena.close()
    assert (seen, held()) == ([True], None)


def test_an_arena_of_no_bytes_is_refused(transport: InMemoryTransport) -> None:
    with pytest.raises(TransportError, match="0 bytes"):
        Arena(0, transport)


@pytest.mark.parametrize("device", ["cuda:99", "meta", "xpu:0", "no-such-device"])
def test_a_device_that_is_not_here_is_refused(transport: InMemoryTransport, device: str) -> None:
    with pytest.raises(UnsupportedError, match=device):
        Arena(4096, transport, device)
