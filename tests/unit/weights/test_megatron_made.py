"""Copies of what no view of a trainer's memory can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.weights.boxes.placement import assemble
from engine_plugins.weights.sources.megatron.made import MadeTensors
from engine_plugins.weights.sources.megatron.rank import MegatronChunk, MegatronRank
from engine_plugins.weights.sources.megatron.source import megatron_boxes
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.transport.in_memory import InMemoryTransport

CONFIG = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 1,
    "hidden_size": 3,
    "intermediate_size": 4,
    "num_local_experts": 4,
    "vocab_size": 8,
}
EXPERTS = "decoder.layers.0.mlp.experts."


def experts(ep_rank: int = 0, ep_size: int = 1, **changes: object) -> MegatronRank:
    """GPT-OSS' experts: gate rows hold the even numbers of HF's last axis, up rows the odd ones."""
    whole = torch.arange(4 * 3 * 8).float().view(4, 3, 8)
    tensors = {}
    for local, number in enumerate(torch.arange(4).chunk(ep_size)[ep_rank].tolist()):
        turned = whole[number].t()
        fc1 = torch.cat([turned[0::2], turned[1::2]])
        tensors[f"{EXPERTS}linear_fc1.weight{local}"] = fc1.contiguous()
        tensors[f"{EXPERTS}linear_fc1.bias{local}"] = fc1[:, 0].clone()
        tensors[f"{EXPERTS}linear_fc2.weight{local}"] = turned[:4].t().contiguous()
        tensors[f"{EXPERTS}linear_fc2.bias{local}"] = turned[0].clone()
    chunk = MegatronChunk(tensors=tensors, global_layers=[0])
    return MegatronRank(
        chunks=[replace(chunk, **changes)],  # type: ignore[arg-type]
        tp_rank=0,
        tp_size=1,
        ep_rank=ep_rank,
        ep_size=ep_size,
    )


def test_stacked_experts_of_all_ranks_are_one_tensor() -> None:
    boxes = [box for ep in range(2) for box in megatron_boxes(experts(ep, 2), CONFIG)]
    found = {name.split("experts.")[1]: tensor for name, tensor in assemble(boxes).items()}
    whole = torch.arange(4 * 3 * 8).float().view(4, 3, 8)
    assert torch.equal(found["gate_up_proj"], whole)
    assert torch.equal(found["gate_up_proj_bias"], whole[:, 0])
    assert torch.equal(found["down_proj"], whole[..., :4].transpose(1, 2))
    assert torch.equal(found["down_proj_bias"], whole[..., 0])
    assert {box.made for box in boxes if "gate_up" in box.name} == {True}
    assert not any(box.made for box in boxes if "down" in box.name)


def test_copies_are_filled_where_they_are_while_somebody_offers_them() -> None:
    rank, made = experts(), MadeTensors()
    before = megatron_boxes(rank, CONFIG, made=made)
    for tensor in rank.chunks[0].tensors.values():
        tensor.neg_()
    after = megatron_boxes(rank, CONFIG, made=made)
    assert [box.data.data_ptr() for box in before] == [box.data.data_ptr() for box in after]
    assert assemble(after)["model.layers.0.mlp.experts.gate_up_proj"][3, 2, 7] == -95
    del before, after
    assert len(made._copies) == 0, "who lets go of a copy frees it"


def test_a_source_says_how_many_bytes_are_there_twice() -> None:
    """The experts, and not their down projections' biases, which are read where they lie."""
    rank, made, transport = experts(), MadeTensors(), InMemoryTransport("trainer")
    with WeightSource(lambda: megatron_boxes(rank, CONFIG, made=made), transport) as source:
        assert source.copied_bytes == 4 * 4 * (8 * 3 + 8 + 4 * 3)
        assert not source.refresh(), "copies stay where they are"
    transport.close()


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"linear_fc1\.weight0: moe_mlp_glu_interleave"):
        megatron_boxes(experts(glu_interleave=2), CONFIG)
    with pytest.raises(SourceError, match=r"linear_fc1\.weight0: .*\(8, 3\).*\(12, 3\)"):
        megatron_boxes(experts(), CONFIG | {"intermediate_size": 6})
