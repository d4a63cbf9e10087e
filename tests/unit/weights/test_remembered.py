"""An unchanged model is not described again, and no change of one goes unseen."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine_plugins.errors import SourceError
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.sources import source as source_module
from engine_plugins.weights.sources.hf_offer import HfOffer
from engine_plugins.weights.sources.megatron.offer import MegatronOffer
from engine_plugins.weights.sources.megatron.rank import MegatronChunk, MegatronRank
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.in_memory import InMemoryTransport

pytestmark = pytest.mark.core

_agents = count()


class Layer(nn.Module):
    """A layer with a matrix, a vector and a saved buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.register_buffer("bias", torch.randn(3))


def model() -> nn.Module:
    return nn.Sequential(*(Layer() for _ in range(3)))


def layer(of: nn.Module, number: int) -> Layer:
    found = of.get_submodule(str(number))
    assert isinstance(found, Layer)
    return found


def place(box: SourceBox) -> tuple[object, ...]:
    data = box.data
    return (box.name, box.start, box.global_shape, data.dtype, data.data_ptr(), data.stride())


def bits(boxes: Sequence[SourceBox]) -> list[tuple[str, torch.Tensor]]:
    return [(box.name, box.data.clone()) for box in boxes]


# -- every way in which a model can change -----------------------------------------------------


def _in_place(trained: nn.Module, n: int) -> None:
    with torch.no_grad():
        layer(trained, n).proj.weight.mul_(2)


def _data(trained: nn.Module, n: int) -> None:
    layer(trained, n).proj.weight.data = torch.randn(4, 4)


def _data_turned(trained: nn.Module, n: int) -> None:
    weight = layer(trained, n).proj.weight
    weight.data = weight.data.t()


def _data_cast(trained: nn.Module, n: int) -> None:
    weight = layer(trained, n).proj.weight
    weight.data = weight.data.to(torch.bfloat16)


def _data_of_another(trained: nn.Module, n: int) -> None:
    """Two parameters change places: every storage is known, each under another name."""
    one, other = layer(trained, n).proj.weight, layer(trained, (n + 1) % 3).proj.weight
    one.data, other.data = other.data, one.data


def _assigned(trained: nn.Module, n: int) -> None:
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    trained.load_state_dict(state, assign=True)


def _parameter(trained: nn.Module, n: int) -> None:
    layer(trained, n).proj.weight = nn.Parameter(torch.randn(4, 4))


def _parameter_over_the_same(trained: nn.Module, n: int) -> None:
    proj = layer(trained, n).proj
    proj.weight = nn.Parameter(proj.weight.data)


def _module(trained: nn.Module, n: int) -> None:
    layer(trained, n).proj = nn.Linear(4, 4)


def _merged(trained: nn.Module, n: int) -> None:
    """As a merged adapter puts the layer back that it had wrapped."""
    wrapped = layer(trained, n).proj
    merged = nn.Linear(4, 4, bias=wrapped.bias is not None)
    with torch.no_grad():
        merged.weight.copy_(wrapped.weight + 1)
    layer(trained, n).proj = merged


def _bias_gone(trained: nn.Module, n: int) -> None:
    layer(trained, n).proj.register_parameter("bias", None)


def _bias_there(trained: nn.Module, n: int) -> None:
    layer(trained, n).proj.bias = nn.Parameter(torch.randn(4))


def _buffer(trained: nn.Module, n: int) -> None:
    layer(trained, n).bias = torch.randn(3)


def _buffer_not_saved(trained: nn.Module, n: int) -> None:
    held = layer(trained, n)
    held.register_buffer("bias", held.get_buffer("bias"), persistent=False)


def _storage(trained: nn.Module, n: int) -> None:
    """The storage grows where it is, and what is in it may have moved."""
    layer(trained, n).proj.weight.data.untyped_storage().resize_(4096)


def _layer_more(trained: nn.Module, n: int) -> None:
    trained.add_module(f"more{n}", Layer())


def _renamed(trained: nn.Module, n: int) -> None:
    held = trained._modules.pop("2", None)
    if held is not None:
        trained._modules["two"] = held
    else:
        trained._modules["2"] = trained._modules.pop("two")


CHANGES: list[Callable[[nn.Module, int], None]] = [
    _in_place,
    _data,
    _data_turned,
    _data_cast,
    _assigned,
    _parameter,
    _parameter_over_the_same,
    _module,
    _merged,
    _bias_gone,
    _bias_there,
    _buffer,
    _buffer_not_saved,
    _storage,
    _layer_more,
    _renamed,
]


@given(
    st.lists(
        st.tuples(st.sampled_from([*CHANGES, _data_of_another]), st.integers(0, 1)), max_size=6
    )
)
def test_no_change_goes_unseen(changes: list[tuple[Callable[[nn.Module, int], None], int]]) -> None:
    """Whatever a trainer does between updates, what is offered is what a fresh look gives."""
    trained = model()
    offer = HfOffer(trained)
    for change, number in changes:
        offer.boxes()
        if change is _data_of_another and "2" not in trained._modules:
            continue
        change(trained, number)
        offered, fresh = offer.boxes(), HfOffer(trained).boxes()
        assert list(map(place, offered)) == list(map(place, fresh))
        assert all(torch.equal(a.data, b.data) for a, b in zip(offered, fresh, strict=True))
        assert offer.boxes() is offered


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_follows_every_change(change: Callable[[nn.Module, int], None]) -> None:
    """Registered and told anew where memory moved, and only there."""
    trained = model()
    offer = HfOffer(trained)
    with WeightSource(offer.boxes, InMemoryTransport(f"trainer-{next(_agents)}")) as source:
        assert not source.refresh()
        before = list(map(place, HfOffer(trained).boxes()))
        change(trained, 0)
        fresh = HfOffer(trained).boxes()
        moved = before != list(map(place, fresh)) or change is _storage
        assert source.refresh() == moved
        assert source.nbytes == sum(box.data.nbytes for box in fresh)
        assert not source.refresh()


def test_memory_that_was_freed_is_refused_and_not_remembered() -> None:
    trained = model()
    offer = HfOffer(trained)
    offer.boxes()
    layer(trained, 1).proj.weight.data.untyped_storage().resize_(0)
    with pytest.raises(SourceError, match=r"1\.proj\.weight"):
        offer.boxes()
    with pytest.raises(SourceError, match=r"1\.proj\.weight"):
        offer.boxes()


def test_a_function_and_named_tensors_are_looked_at_too() -> None:
    """The same tensors are the same boxes; another object over them, or other names, are not."""
    held = {"a": torch.randn(4, 4), "b": torch.randn(4)}
    for offer in (HfOffer(lambda: held), HfOffer(lambda: iter(held.items()))):
        first = offer.boxes()
        assert offer.boxes() is first
        held["a"] = torch.randn(4, 4)
        second = offer.boxes()
        assert second is not first
        assert second[0].data.data_ptr() == held["a"].data_ptr()
    offer = HfOffer(lambda: held)
    offer.boxes()
    held["c"] = held.pop("b")
    assert [box.name for box in offer.boxes()] == ["a", "c"]


def test_a_tied_head_is_compared_in_every_update() -> None:
    """Its place does not tell: the values may part."""
    held = {"model.embed_tokens.weight": torch.randn(8, 4)}
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    offer = HfOffer(held, {"tie_word_embeddings": True})
    assert offer.boxes() is offer.boxes()
    held["lm_head.weight"].add_(1)
    with pytest.raises(SourceError, match="lm_head"):
        offer.boxes()


def test_megatrons_parameters_are_remembered_alike() -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 16,
        "tie_word_embeddings": False,
    }
    tensors = {
        "embedding.word_embeddings.weight": torch.randn(16, 8),
        "decoder.final_layernorm.weight": torch.randn(8),
        "output_layer.weight": torch.randn(16, 8),
    }
    rank = MegatronRank(
        chunks=[MegatronChunk(tensors=tensors, global_layers=[])], tp_rank=0, tp_size=1
    )
    offer = MegatronOffer(lambda: [rank], rank, config, None)
    first = offer.boxes()
    assert offer.boxes() is first
    tensors["decoder.final_layernorm.weight"].data = torch.randn(8)
    second = offer.boxes()
    assert second is not first
    assert {box.data.data_ptr() for box in second} == {t.data_ptr() for t in tensors.values()}
    others = {name: torch.randn_like(each) for name, each in tensors.items()}
    ranks = [rank]
    listed = MegatronOffer(lambda: ranks, ranks, config, None)
    listed.boxes()
    ranks[0] = MegatronRank(
        chunks=[MegatronChunk(tensors=others, global_layers=[])], tp_rank=0, tp_size=1
    )
    assert {box.data.data_ptr() for box in listed.boxes()} == {
        each.data_ptr() for each in others.values()
    }, "another share in the list that was given"


def test_boxes_given_once_are_followed_without_being_described() -> None:
    """Of a sequence of boxes a replaced `.data` is seen, and nothing costs a second look."""
    weight = nn.Parameter(torch.randn(4, 4))
    boxes = [SourceBox(name="w", global_shape=(4, 4), start=(0, 0), data=weight)]
    with WeightSource(boxes, InMemoryTransport(f"trainer-{next(_agents)}")) as source:
        assert not source.refresh()
        weight.data = torch.randn(4, 4)
        assert source.refresh()
        assert not source.refresh()


def test_a_release_lets_go_of_what_was_remembered() -> None:
    """The model's memory can go: nothing here holds it, and the next look describes anew."""
    trained = model()
    offer = HfOffer(trained)
    with WeightSource(offer.boxes, InMemoryTransport(f"trainer-{next(_agents)}")) as source:
        gone = weakref.ref(layer(trained, 0).proj)
        held = weakref.ref(layer(trained, 0).proj.weight)
        source.release()
        offer.forget()
        layer(trained, 0).proj = nn.Linear(4, 4)
        gc.collect()
        assert gone() is None
        assert held() is None
        assert source.refresh()


# -- GPUs --------------------------------------------------------------------------------------


class OnGpu(torch.Tensor):
    """A tensor that says that it lies on a GPU, and tells when it is read or written."""

    told: list[str]

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")

    def copy_(self, *args: object, **kwargs: object) -> torch.Tensor:
        self.told.append("copy")
        return torch.Tensor.copy_(self, *args, **kwargs)  # type: ignore[arg-type]


class DeviceTransport(InMemoryTransport):
    """Takes memory of any device, and moves none."""

    def register(self, address: int, nbytes: int, device: int) -> None:
        super().register(address, nbytes, -1)


def test_streams_are_waited_for_before_a_copy_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer on a stream of its own is done, and so is the copy before peers are told."""
    log: list[str] = []

    def on_gpu(data: torch.Tensor) -> torch.Tensor:
        made = torch.Tensor._make_subclass(OnGpu, data)
        assert isinstance(made, OnGpu)
        made.told = log
        return made

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(f"wait {device}"))
    monkeypatch.setattr(source_module, "copy_memory", lambda data: on_gpu(torch.empty(data.shape)))
    turned = on_gpu(torch.randn(4, 4).t())
    boxes = [SourceBox(name="w", global_shape=(4, 4), start=(0, 0), data=turned)]
    with WeightSource(boxes, DeviceTransport(f"trainer-{next(_agents)}")) as source:
        for _ in range(2):
            assert log == ["wait cuda:0", "copy", "wait cuda:0"]
            log.clear()
            source.refresh()
    plain = hf_boxes({"w": torch.randn(4, 4)})
    log.clear()
    with WeightSource(plain, InMemoryTransport(f"trainer-{next(_agents)}")):
        assert log == []
