"""A source keeps what it offers alive, true and registered, and nothing longer than that."""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from engine_plugins.errors import SourceError, TransportError
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.contract.manifest import decode_manifest, numbers
from engine_plugins.weights.contract.version_word import WORD_BYTES
from engine_plugins.weights.memory.source_memory import regions_of, warn_of_expandable_segments
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.pull import pull


def whole(name: str, data: torch.Tensor) -> SourceBox:
    return SourceBox(name=name, global_shape=tuple(data.shape), start=(0,) * data.ndim, data=data)


@pytest.fixture
def transport() -> Iterator[InMemoryTransport]:
    agent = InMemoryTransport("trainer-0")
    yield agent
    agent.close()


class Recorder(InMemoryTransport):
    """An in-memory agent that says what is registered now, and can refuse."""

    def __init__(self, agent: str) -> None:
        super().__init__(agent)
        self.held: dict[int, int] = {}
        self.words: set[int] = set()
        """Of `held`, what is no tensor's: version words."""
        self.refuse_after: int | None = None

    def register(self, address: int, nbytes: int, device: int) -> None:
        if self.refuse_after is not None and len(self.held) >= self.refuse_after:
            raise TransportError("no more memory can be registered")
        super().register(address, nbytes, device)
        if nbytes == WORD_BYTES and not address % mmap.PAGESIZE:
            self.words.add(address)
        else:
            self.held[address] = nbytes

    def deregister(self, address: int) -> None:
        super().deregister(address)
        if address in self.words:
            self.words.remove(address)
        else:
            del self.held[address]


def test_what_is_pulled_is_what_the_trainer_holds(transport: InMemoryTransport) -> None:
    """Whole tensors, shards, gaps between rows, odd offsets, scalars: all bit for bit."""
    fused = torch.randn(6, 10)
    boxes = [
        whole("plain", torch.randn(5, 7)),
        SourceBox(name="up", global_shape=(6, 8), start=(0, 0), data=fused[:, 1:5]),
        SourceBox(name="up", global_shape=(6, 8), start=(0, 4), data=fused[:, 6:]),
        whole("half", torch.randn(3, 3).bfloat16()[1:]),
        whole("scalar", torch.tensor(2.5)),
        whole("expanded", torch.randn(1, 4).expand(3, 4)),
    ]
    with WeightSource(boxes, transport) as source:
        manifest = decode_manifest(source.manifest_bytes, max_entries=100)
        pulled = pull(manifest)
        assert source.copied_bytes == 0
    assert torch.equal(pulled["up"], torch.cat([fused[:, 1:5], fused[:, 6:]], dim=1))
    for box in boxes:
        if box.name != "up":
            assert torch.equal(pulled[box.name], box.data)


def test_boxes_of_one_storage_share_one_region(transport: InMemoryTransport) -> None:
    """Storages are registered, never tensors: 50 views are one region."""
    flat = torch.randn(50, 4)
    boxes = [whole(f"t{n}", flat[n]) for n in range(50)] + [whole("other", torch.randn(3))]
    with WeightSource(boxes, transport) as source:
        assert sorted(numbers(source.manifest.regions.nbytes)) == [12, 800]


def test_overlapping_foreign_buffers_become_one_region() -> None:
    """Two tensors over one numpy buffer have two storages, and one region."""
    buffer = np.zeros(64, dtype=np.float32)
    low, high = torch.from_numpy(buffer[:40]), torch.from_numpy(buffer[20:])
    (region,) = regions_of([high, low])
    assert (region.address, region.nbytes) == (buffer.ctypes.data, 256)
    assert len(region.storages) == 2


def test_sources_outlive_everything_else(transport: InMemoryTransport) -> None:
    """With no reference left but the source's, freed memory overwritten, the bytes are right."""

    def offered() -> tuple[list[SourceBox], list[torch.Tensor]]:
        tensors = [torch.randn(64, 33), torch.randn(33, 64).t(), torch.randn(64, 66)[:, ::2]]
        boxes = [whole(f"t{n}", tensor) for n, tensor in enumerate(tensors)]
        return boxes, [tensor.clone() for tensor in tensors]

    boxes, expected = offered()
    source = WeightSource(boxes, transport)
    assert source.copied_bytes == 2 * 64 * 33 * 4
    del boxes
    gc.collect()
    litter = [torch.full((64, 33), float("nan")) for _ in range(200)]
    pulled = pull(source.manifest)
    del litter
    for n, tensor in enumerate(expected):
        assert torch.equal(pulled[f"t{n}"], tensor)
    source.close()


def test_copies_follow_the_trainer_at_refresh(transport: InMemoryTransport) -> None:
    """A box with strided elements is a copy, stale until `refresh`; others are live."""
    parameter = torch.nn.Parameter(torch.randn(4, 6))
    boxes = [whole("live", parameter), whole("copied", parameter.t())]
    with WeightSource(boxes, transport) as source:
        before = source.manifest
        with torch.no_grad():
            parameter.add_(1)
        assert torch.equal(pull(source.manifest)["live"], parameter)
        assert not source.refresh()
        assert source.manifest is before
        assert torch.equal(pull(source.manifest)["copied"], parameter.t())


def test_a_replaced_tensor_is_registered_anew() -> None:
    """An optimizer that swaps `.data` changes the manifest, and the old memory is let go."""
    transport = Recorder("trainer-0")
    parameter = torch.nn.Parameter(torch.randn(4, 6))
    with WeightSource(lambda: [whole("w", parameter.detach())], transport) as source:
        old = weakref.ref(parameter.untyped_storage())
        address = parameter.data_ptr()
        parameter.data = torch.randn(4, 6)
        assert address in transport.held, "registered memory must outlive the swap"
        assert source.refresh()
        assert list(transport.held) == [parameter.data_ptr()]
        assert torch.equal(pull(source.manifest)["w"], parameter)
        assert not source.refresh()
        gc.collect()
        assert old() is None
    transport.close()


def test_a_replaced_tensor_is_seen_without_a_function(transport: InMemoryTransport) -> None:
    """Boxes over the parameter object itself are followed too."""
    parameter = torch.nn.Parameter(torch.randn(4, 6))
    with WeightSource([whole("w", parameter)], transport) as source:
        parameter.data = torch.randn(4, 6)
        assert source.refresh()
        assert torch.equal(pull(source.manifest)["w"], parameter)


def test_a_strided_tensor_that_moved_keeps_its_copy(transport: InMemoryTransport) -> None:
    """Only our copy is registered, so the manifest stays as it was."""
    parameter = torch.nn.Parameter(torch.randn(4, 6))
    with WeightSource(lambda: [whole("w", parameter.t())], transport) as source:
        parameter.data = torch.randn(4, 6)
        assert not source.refresh()
        assert torch.equal(pull(source.manifest)["w"], parameter.t())


def test_tensors_without_elements_are_named_and_have_no_memory(
    transport: InMemoryTransport,
) -> None:
    """A zero-size tensor or shard is a row of names and shapes, no box and no region."""
    boxes = [
        whole("empty", torch.empty(0, 8)),
        SourceBox(name="shard", global_shape=(4, 2), start=(4, 0), data=torch.empty(0, 2)),
    ]
    with WeightSource(boxes, transport) as source:
        manifest = decode_manifest(source.manifest_bytes, max_entries=10)
    assert manifest.tensors.names == ["empty", "shard"]
    assert manifest.box_count == 0
    assert manifest.regions.addresses == b""


def test_a_process_may_hold_nothing(transport: InMemoryTransport) -> None:
    """It has an empty manifest, which the sender does not send."""
    with WeightSource([], transport) as source:
        assert source.manifest.tensors.names == []
        assert source.nbytes == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.empty(3, 4, device="meta"), "on meta"),
        (torch.eye(4).to_sparse(), "sparse"),
        (torch.zeros(3, dtype=torch.complex64), "complex64"),
    ],
)
def test_what_has_no_plain_memory_is_refused(
    transport: InMemoryTransport, data: torch.Tensor, words: str
) -> None:
    """Meta, sparse and complex tensors cannot be read as bytes of weights."""
    with pytest.raises(SourceError, match=words):
        WeightSource([whole("w", data)], transport)


def test_a_storage_that_was_freed_in_place_is_refused(transport: InMemoryTransport) -> None:
    """FSDP frees shards by resizing their storage to nothing."""
    data = torch.randn(8)
    with WeightSource([whole("w", data)], transport) as source:
        data.untyped_storage().resize_(0)
        with pytest.raises(SourceError, match="no memory of its own"):
            source.refresh()


def test_shards_that_disagree_are_refused(transport: InMemoryTransport) -> None:
    """One tensor has one dtype and one whole shape."""
    boxes = [whole("w", torch.zeros(4)), whole("w", torch.zeros(4).bfloat16())]
    with pytest.raises(SourceError, match=r"w is offered as .*float32.* and as .*bfloat16"):
        WeightSource(boxes, transport)


def test_closing_takes_everything_back_and_may_be_repeated() -> None:
    """Nothing stays registered, no tensor stays alive, and use afterwards is an error."""
    transport = Recorder("trainer-0")
    data = torch.randn(4, 4)
    gone = weakref.ref(data)
    source = WeightSource([whole("w", data)], transport)
    del data
    source.close()
    source.close()
    gc.collect()
    assert transport.held == {}
    assert gone() is None
    with pytest.raises(SourceError, match="closed"):
        source.refresh()
    with pytest.raises(SourceError, match="offers nothing"):
        _ = source.manifest
    transport.close()


def test_a_failed_registration_leaves_nothing_registered() -> None:
    """What was registered before the failure is taken back."""
    transport = Recorder("trainer-0")
    transport.refuse_after = 2
    boxes = [whole(f"t{n}", torch.randn(8)) for n in range(4)]
    with pytest.raises(TransportError):
        WeightSource(boxes, transport)
    assert transport.held == {}
    transport.close()


def test_a_refresh_that_fails_can_be_repeated() -> None:
    """After a failure nothing is offered; the next refresh offers everything again."""
    transport = Recorder("trainer-0")
    parameter = torch.nn.Parameter(torch.randn(4, 6))
    with WeightSource([whole("w", parameter)], transport) as source:
        parameter.data = torch.randn(4, 6)
        transport.refuse_after = 0
        with pytest.raises(TransportError):
            source.refresh()
        with pytest.raises(SourceError):
            _ = source.manifest
        transport.refuse_after = None
        assert source.refresh()
        assert torch.equal(pull(source.manifest)["w"], parameter)
    transport.close()


def foreign(buffer: bytearray, first: int, items: int) -> torch.Tensor:
    """A tensor with a storage of its own over a part of a buffer, as allocators cut segments."""
    return torch.frombuffer(memoryview(buffer)[4 * first :], dtype=torch.float32, count=items)


def test_storages_of_one_segment_are_one_region() -> None:
    """From the first to the last of them; of two segments that touch, two."""
    buffer = bytearray(4 * 100)
    cut = [foreign(buffer, first, 10) for first in (5, 20, 60, 85)]
    start = cut[0].data_ptr() - 20
    segments = [(-1, range(start, start + 200)), (-1, range(start + 200, start + 400))]
    for order in (segments, segments[::-1]):
        regions = regions_of(cut, order)
        assert [(region.address - start, region.nbytes) for region in regions] == [
            (20, 100),
            (240, 140),
        ]
        assert [len(region.storages) for region in regions] == [2, 2]
    for elsewhere in (
        [],
        [(0, range(start, start + 400))],
        [(-1, range(start + 200, start + 210))],
    ):
        assert len(regions_of(cut, elsewhere)) == 4


def test_registered_memory_is_exactly_the_storages() -> None:
    """The region starts and ends where the allocation does."""
    transport = Recorder("trainer-0")
    data = torch.arange(10.0)
    with WeightSource([whole("w", data[3:7])], transport) as source:
        assert transport.held == {data.data_ptr(): 40}
        assert source.manifest.box(0).offset_bytes == 12
        assert ctypes.string_at(data.data_ptr() + 12, 16) == data[3:7].numpy().tobytes()
    transport.close()


def test_expandable_segments_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Only for CUDA memory, and only while the allocator is set so."""
    on_host = regions_of([torch.zeros(4)])
    on_cuda = regions_of([torch.zeros(1 << 20)])
    object.__setattr__(on_cuda[0], "device", 0)
    warn_of_expandable_segments(on_cuda)
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    try:
        with caplog.at_level(logging.WARNING):
            warn_of_expandable_segments(on_host)
            assert not caplog.records
            warn_of_expandable_segments([*on_host, *on_cuda])
    finally:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
    assert "0.004 GiB" in caplog.text
    assert "a setting made at run time" in caplog.text
    assert "cannot walk" in caplog.text
