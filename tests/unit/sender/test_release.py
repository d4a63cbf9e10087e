"""A trainer's memory between updates: let go of when asked, and never taken for what it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch

from engine_plugins.errors import SettingsError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.contract.version_word import WORD_BYTES
from engine_plugins.weights.sources.forms.block_fp8 import BlockFp8
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.fake_engine import TOKEN, FakeEngine

NBYTES = 1 << 20


class Recorder(InMemoryTransport):
    """An agent that knows what of tensors is registered, and how often something was."""

    def __init__(self, agent: str) -> None:
        super().__init__(agent)
        self.held: set[int] = set()
        self.registered = 0

    def register(self, address: int, nbytes: int, device: int) -> None:
        super().register(address, nbytes, device)
        if nbytes != WORD_BYTES:
            self.held.add(address)
            self.registered += 1

    def deregister(self, address: int) -> None:
        super().deregister(address)
        self.held.discard(address)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    transport = Recorder("trainer")
    yield transport
    transport.close()


@pytest.fixture
def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(NBYTES // 4))


def sender_of(
    parameter: torch.nn.Parameter, engine: FakeEngine, transport: Recorder, **more: Any
) -> WeightSender:
    return WeightSender.from_hf(
        lambda: {"w": parameter}.items(),
        engines=engine.url,
        token=TOKEN,
        transport=transport,
        **more,
    )


@pytest.mark.parametrize("direction", ["pull", "push"])
def test_released_memory_is_free_and_the_next_update_offers_it_anew(
    parameter: torch.nn.Parameter,
    engine: FakeEngine,
    recorder: Recorder,
    direction: Literal["pull", "push"],
) -> None:
    """Offloaded to make room: nothing of ours holds it, or its registration."""
    with sender_of(parameter, engine, recorder, direction=direction) as sender:
        sender.update(1)
        sender.release()
        sender.release()
        assert recorder.held == set()
        storage = weakref.ref(parameter.untyped_storage())
        parameter.data = torch.empty(0)
        gc.collect()
        assert storage() is None
        parameter.data = torch.full((NBYTES // 4,), 2.0)
        sender.update(2)
        assert torch.equal(engine.weights["w"], parameter)
        assert recorder.held == {parameter.data_ptr()}
        assert len(engine.plans) == 2


@pytest.mark.parametrize("way", ["release", "every_update"])
def test_memory_that_was_unmapped_is_registered_anew(
    parameter: torch.nn.Parameter, engine: FakeEngine, recorder: Recorder, way: str
) -> None:
    """Emptied and filled in place, as offloading trainers do: same storage, address and size."""
    register = "every_update" if way == "every_update" else "once"
    with sender_of(parameter, engine, recorder, register=register) as sender:
        storage = parameter.untyped_storage()
        for version in (1, 2, 3):
            sender.update(version)
            assert torch.equal(engine.weights["w"], parameter)
            if way == "release":
                sender.release()
            assert recorder.held == set(), "registered over memory that is about to go"
            storage.resize_(0)
            storage.resize_(NBYTES)
            with torch.no_grad():
                parameter.fill_(float(version))
        at_the_start = 1
        assert recorder.registered == 3 + (at_the_start if way == "every_update" else 0)


def test_a_sender_registers_once_unless_it_is_told_otherwise(
    parameter: torch.nn.Parameter, engine: FakeEngine, recorder: Recorder
) -> None:
    with sender_of(parameter, engine, recorder) as sender:
        sender.update(1)
        sender.update(2)
        assert recorder.registered == len(engine.plans) == 1
    with pytest.raises(SettingsError, match="register is 'always'"):
        sender_of(parameter, engine, recorder, register="always")


def test_another_storage_at_the_same_address_is_seen(recorder: Recorder) -> None:
    """The allocator gave the place to another tensor: the registration may be of the old pages."""
    place = bytearray(64)
    tensors = {"w": torch.frombuffer(place, dtype=torch.float32)}
    with WeightSource(lambda: hf_boxes(tensors), recorder) as source:
        assert not source.refresh()
        tensors["w"] = torch.frombuffer(place, dtype=torch.float32)
        assert source.refresh()
        assert recorder.registered == 2
        assert not source.refresh()


def test_slots_of_quantized_weights_are_let_go_too(engine: FakeEngine, recorder: Recorder) -> None:
    """They are half as large as the weights themselves."""
    name = "model.layers.0.mlp.up_proj.weight"
    weights = {name: torch.randn(256, 256).bfloat16()}
    with WeightSender.from_hf(
        weights.items,
        engines=engine.url,
        token=TOKEN,
        transport=recorder,
        quantization=BlockFp8(),
    ) as sender:
        sender.update(1)
        first = engine.weights[name].clone()
        assert len(recorder.held) == 1
        slots = weakref.ref(sender._job.offer.source._placed[0].memory.untyped_storage())
        sender.release()
        gc.collect()
        assert slots() is None
        sender.update(2)
        assert torch.equal(engine.weights[name].view(torch.uint8), first.view(torch.uint8))
