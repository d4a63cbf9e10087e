"""CUDA memory that wires can register, on a real GPU. Nothing here has run yet: see decision D28.

UCX stays on loopback (tests/conftest.py) unless UCX_NET_DEVICES names RDMA ports; with them these
transfers go through the card.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from engine_plugins.errors import TransferTimeoutError, TransportError
from engine_plugins.weights.hardware.cuda_pool import PlainCudaPool
from engine_plugins.weights.hardware.cuda_runtime import gpu_pci_address, torch_cuda_runtime
from engine_plugins.weights.hardware.expandable_segments import asked_for, expandable_ranges
from engine_plugins.weights.hardware.rdma_ports import gpu_places
from engine_plugins.weights.memory.arena import Arena
from engine_plugins.weights.memory.source_memory import regions_of
from engine_plugins.weights.transport.nixl import NixlTransport
from engine_plugins.weights.transport.transfers import run_transfers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this process has no CUDA device"),
]

MIB = 1 << 20
DEVICE = torch.device("cuda:0")


@pytest.fixture
def expandable() -> Iterator[None]:
    """The allocator as trainers set it, from here on."""
    torch.cuda.init()
    torch.cuda.empty_cache()
    before = asked_for()
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    yield
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{before is not None}")


@pytest.fixture
def agents() -> Iterator[tuple[NixlTransport, NixlTransport]]:
    """A reader and the one it reads from."""
    pair = (NixlTransport("gpu-reader"), NixlTransport("gpu-source"))
    yield pair
    for agent in pair:
        agent.close()


def is_expandable(tensor: torch.Tensor) -> bool:
    return any(tensor.data_ptr() in each for each in expandable_ranges())


def read(agents: tuple[NixlTransport, NixlTransport], offered: torch.Tensor) -> torch.Tensor:
    """A host copy of what a read brings into an arena on the GPU."""
    reader, source = agents
    source.register(offered.data_ptr(), offered.nbytes, 0)
    torch.cuda.synchronize(DEVICE)
    reader.add_peer(source.agent, source.metadata())
    arena = Arena(offered.nbytes, reader, str(DEVICE))
    try:
        rows = np.array([[arena.address, offered.data_ptr(), offered.nbytes]], dtype=np.uint64)
        prepared = reader.prepare_read(source.agent, rows, local_device=0, remote_device=0)
        run_transfers([prepared], deadline_s=60.0)
        prepared.release()
        return arena.tensor(0, (offered.nbytes,), torch.uint8).cpu()
    except TransferTimeoutError:
        arena.quarantine()
        raise
    finally:
        arena.close()
        source.deregister(offered.data_ptr())


@pytest.mark.usefixtures("expandable")
def test_the_pool_is_plain_where_torchs_own_memory_is_expandable() -> None:
    own = torch.empty(64 * MIB, dtype=torch.uint8, device=DEVICE)
    pool = PlainCudaPool(DEVICE)
    plain = pool.empty((64 * MIB,), torch.uint8)
    with pool.active():
        built = torch.ones(64 * MIB, dtype=torch.uint8, device=DEVICE)
    assert asked_for() == "a setting made at run time"
    assert [is_expandable(tensor) for tensor in (own, plain, built)] == [True, False, False]
    assert int(built.sum(dtype=torch.int64)) == 64 * MIB
    del plain, built
    pool.close()


@pytest.mark.usefixtures("expandable")
def test_closing_gives_memory_back_and_spares_what_is_still_held() -> None:
    pool = PlainCudaPool(DEVICE)
    kept = pool.empty((64 * MIB,), torch.uint8).fill_(7)
    large = pool.empty((1024 * MIB,), torch.uint8)
    free_before, _ = torch.cuda.mem_get_info(DEVICE)
    del large
    pool.close()
    free_after, _ = torch.cuda.mem_get_info(DEVICE)
    assert free_after - free_before >= 1024 * MIB
    assert int(kept.sum(dtype=torch.int64)) == 7 * 64 * MIB
    with pytest.raises(TransportError, match="closed"):
        pool.empty((1,), torch.uint8)


@pytest.mark.usefixtures("expandable")
def test_too_large_an_allocation_is_torchs_own_error() -> None:
    pool = PlainCudaPool(DEVICE)
    _, total = torch.cuda.mem_get_info(DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        pool.empty((2 * total,), torch.uint8)
    assert pool.empty((MIB,), torch.uint8).nbytes == MIB
    pool.close()


def test_tensors_of_one_segment_are_registered_as_one() -> None:
    """Torch's allocator cuts tensors of a few MiB from segments of 20 MiB."""
    pool = PlainCudaPool(DEVICE)
    tensors = [pool.empty((2 * MIB,), torch.uint8) for _ in range(4)]
    (region,) = regions_of(tensors)
    assert len(region.storages) == 4
    assert region.nbytes >= 8 * MIB
    del tensors, region
    pool.close()


@pytest.mark.nixl
@pytest.mark.usefixtures("expandable")
def test_bytes_of_the_pool_arrive(
    agents: tuple[NixlTransport, NixlTransport], caplog: pytest.LogCaptureFixture
) -> None:
    """From pool to arena, which takes a pool of its own and says why."""
    pool = PlainCudaPool(DEVICE)
    offered = pool.empty((64 * MIB,), torch.uint8)
    offered.copy_(torch.arange(64 * MIB, device=DEVICE) % 251)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(read(agents, offered), offered.cpu())
    assert "plain cudaMalloc" in caplog.text
    del offered
    pool.close()


@pytest.mark.nixl
@pytest.mark.usefixtures("expandable")
def test_bytes_of_expandable_segments_arrive_or_fail_aloud(
    agents: tuple[NixlTransport, NixlTransport],
) -> None:
    """Over a card they fail at the transfer; on one host they may come slowly, but right."""
    offered = torch.arange(64 * MIB, device=DEVICE).remainder(251).to(torch.uint8)
    assert is_expandable(offered)
    try:
        arrived = read(agents, offered)
    except TransportError:
        return
    assert torch.equal(arrived, offered.cpu())


def test_torchs_runtime_is_visible_and_knows_where_the_gpu_is() -> None:
    runtime = torch_cuda_runtime()
    assert "libcudart" in runtime.path
    assert runtime.make_visible()
    assert gpu_pci_address(0) in gpu_places()
