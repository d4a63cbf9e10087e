"""Reading model chunks: names, layer numbers and coordinates.

Megatron is not installed in the engines' environments. The modules here are small torch
modules with Megatron's names, nesting, wrappers and `layer_number`; the parallel state is
a stand-in module with the function names of megatron-core 0.16.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine_plugins.errors import NotConfiguredError, SourceError, UnsupportedError
from engine_plugins.weights.boxes.placement import assemble
from engine_plugins.weights.sources.megatron.source import MegatronRank, megatron_boxes
from tests.support.megatron_hf import dense_config, hf_tensors
from tests.support.megatron_shards import megatron_ranks

CONFIG = dense_config(num_hidden_layers=4)


class Wrapper(nn.Module):
    """Like DDP and Float16Module: the model is the attribute `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Layer(nn.Module):
    """Like TransformerLayer: numbered from 1 over the whole model."""

    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number


KINDS = {
    "word_embeddings": "VocabParallelEmbedding",
    "linear_qkv": "TELayerNormColumnParallelLinear",
    "linear_proj": "TERowParallelLinear",
    "linear_fc1": "TELayerNormColumnParallelLinear",
    "linear_fc2": "TERowParallelLinear",
    "output_layer": "ColumnParallelLinear",
}


def module_of_kind(kind: str) -> nn.Module:
    """A module whose class has this name."""
    module: nn.Module = type(kind, (nn.Module,), {})()
    return module


def gpt_model(tensors: dict[str, torch.Tensor], global_layers: list[int]) -> nn.Module:
    """A module tree with the given parameters under their native names."""
    model = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = model
        for depth, part in enumerate(path):
            if not hasattr(module, part):
                is_layer = path[:depth] == ["decoder", "layers"]
                kind = KINDS.get(part, "RMSNorm" if part.endswith("norm") else "Block")
                child = Layer(global_layers[int(part)] + 1) if is_layer else module_of_kind(kind)
                module.add_module(part, child)
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(tensor))
    return model


def model_chunks(rank: MegatronRank) -> list[nn.Module]:
    return [
        Wrapper(Wrapper(gpt_model(dict(chunk.tensors), list(chunk.global_layers))))
        for chunk in rank.chunks
    ]


GROUPS = {
    "tp": "tensor_model_parallel",
    "pp": "pipeline_model_parallel",
    "ep": "expert_model_parallel",
    "etp": "expert_tensor_parallel",
}


def parallel_state(
    groups: dict[str, tuple[int, int]] | None = None, *, initialized: bool = True
) -> ModuleType:
    state = ModuleType("megatron.core.parallel_state")
    places = dict(zip(GROUPS.values(), [(1, 2), (0, 1), (0, 1), (1, 2)], strict=True)) | (
        groups or {}
    )
    state.__dict__["model_parallel_is_initialized"] = lambda: initialized
    for group, (place, size) in places.items():
        state.__dict__[f"get_{group}_rank"] = lambda place=place: place
        state.__dict__[f"get_{group}_world_size"] = lambda size=size: size
    return state


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", parallel_state())
    return monkeypatch


def test_wrapped_chunks_rebuild_the_hf_tensors() -> None:
    """Virtual chunks in two wrappers; layers are placed by `layer_number`, not by order."""
    hf = hf_tensors(CONFIG)
    ranks = megatron_ranks(hf, CONFIG, tp_size=2, stages=[[[0], [2]], [[1], [3]]])
    read = [
        MegatronRank.from_model(model_chunks(rank), tp_rank=rank.tp_rank, tp_size=2)
        for rank in ranks
    ]
    assert [list(chunk.global_layers) for chunk in read[2].chunks] == [[1], [3]]
    rebuilt = assemble(box for rank in read for box in megatron_boxes(rank, CONFIG))
    assert sorted(rebuilt) == sorted(hf)
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in hf.items())


def test_parameters_are_taken_as_they_lie() -> None:
    (rank,) = megatron_ranks(hf_tensors(CONFIG), CONFIG)
    (model,) = model_chunks(rank)
    boxes = megatron_boxes(MegatronRank.from_model([model], tp_rank=0, tp_size=1), CONFIG)
    addresses = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {box.data.untyped_storage().data_ptr() for box in boxes} == addresses


def test_persistent_buffers_are_read_and_others_left_out() -> None:
    """A router's `expert_bias` is a weight; a rotary cache is not."""
    module = nn.Module()
    module.register_buffer("expert_bias", torch.zeros(2))
    module.register_buffer("inv_freq", torch.zeros(2), persistent=False)
    model = nn.Module()
    model.add_module("router", module)
    (chunk,) = MegatronRank.from_model([model], tp_rank=0, tp_size=1).chunks
    assert list(chunk.tensors) == ["router.expert_bias"]


def test_coordinates_come_from_megatron_where_they_are_not_given(
    megatron: pytest.MonkeyPatch,
) -> None:
    rank = MegatronRank.from_model([])
    assert (rank.tp_rank, rank.tp_size, rank.etp_rank, rank.etp_size) == (1, 2, 1, 2)
    assert MegatronRank.from_model([], pp_rank=2, pp_size=4).pp_rank == 2


def test_uninitialised_megatron_is_an_error(megatron: pytest.MonkeyPatch) -> None:
    state = parallel_state(initialized=False)
    megatron.setitem(sys.modules, "megatron.core.parallel_state", state)
    with pytest.raises(NotConfiguredError, match="no groups"):
        MegatronRank.from_model([])


@pytest.mark.parametrize("axis", GROUPS)
def test_each_coordinate_not_given_is_asked_of_megatron(
    megatron: pytest.MonkeyPatch, axis: str
) -> None:
    """Also where the others are given, and where one of a pair is."""
    groups = dict.fromkeys(GROUPS.values(), (1, 8))
    megatron.setitem(sys.modules, "megatron.core.parallel_state", parallel_state(groups))
    given: dict[str, Any] = {}
    for other in set(GROUPS) - {axis}:
        given |= {f"{other}_rank": 0, f"{other}_size": 2}
    rank = MegatronRank.from_model([], **given)
    assert (getattr(rank, f"{axis}_rank"), getattr(rank, f"{axis}_size")) == (1, 8)
    for other in set(GROUPS) - {axis}:
        assert (getattr(rank, f"{other}_rank"), getattr(rank, f"{other}_size")) == (0, 2)
    half = MegatronRank.from_model([], **{**given, f"{axis}_rank": 5})
    assert (getattr(half, f"{axis}_rank"), getattr(half, f"{axis}_size")) == (5, 8)


def test_half_a_place_is_no_place_without_megatron() -> None:
    with pytest.raises(NotConfiguredError) as told:
        MegatronRank.from_model([], tp_rank=0, tp_size=1, ep_size=8)
    assert told.value.remedy == "pass ep_rank and ep_size"


def test_without_megatron_the_coordinates_must_be_given() -> None:
    with pytest.raises(NotConfiguredError, match=r"megatron\.core is not installed"):
        MegatronRank.from_model([], tp_size=2)


def test_a_layer_without_a_number_is_an_error() -> None:
    model = gpt_model({"decoder.layers.0.weight": torch.zeros(1)}, [0])
    model.get_submodule("decoder.layers").add_module("0", nn.Identity())
    with pytest.raises(SourceError, match=r"decoder\.layers\.0: a Identity has no layer_number"):
        MegatronRank.from_model([model], tp_rank=0, tp_size=1)


@pytest.mark.parametrize("where", ["config", "ddp_config"])
def test_options_under_which_a_chunk_cannot_be_read_are_refused(where: str) -> None:
    """Of the model and of its wrapper; before anything is read."""
    option = {"config": "rotary_interleaved", "ddp_config": "reuse_grad_buf_for_mxfp8_param_ag"}
    chunk = Wrapper(nn.Module())
    setattr(chunk, where, SimpleNamespace(**{option[where]: True}))
    with pytest.raises(UnsupportedError, match=option[where]):
        MegatronRank.from_model([Wrapper(chunk)], tp_rank=0, tp_size=1)


def test_a_chunk_says_how_its_experts_lie() -> None:
    chunk = Wrapper(nn.Module())
    chunk.config = SimpleNamespace(moe_mlp_glu_interleave_size=32)  # type: ignore[assignment]
    (read,) = MegatronRank.from_model([chunk], tp_rank=0, tp_size=1).chunks
    assert (read.glu_interleave, read.module) == (32, chunk)


def test_layers_that_do_not_start_at_zero_are_an_error() -> None:
    model = gpt_model({"decoder.layers.1.weight": torch.zeros(1)}, [0, 1])
    with pytest.raises(SourceError, match=r"\[1\], not from 0 on"):
        MegatronRank.from_model([model], tp_rank=0, tp_size=1)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"tp_rank": 2, "tp_size": 2}, "tp_rank 2 does not lie in tp_size 2"),
        ({"tp_rank": -1, "tp_size": 2}, "tp_rank -1"),
        ({"tp_rank": 0, "tp_size": 1, "pp_rank": 1}, "pp_rank 1 does not lie in pp_size 1"),
        ({"tp_rank": 0, "tp_size": 1, "etp_rank": 0}, "etp_size None"),
    ],
)
def test_a_place_outside_its_group_is_an_error(places: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        MegatronRank(chunks=[], **places)
