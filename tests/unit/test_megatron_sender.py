"""Megatron shares of one process reach an engine as the HF model that they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine_plugins.errors import SourceError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.fake_engine import TOKEN, FakeEngine, served
from tests.support.megatron_hf import hf_tensors, moe_config
from tests.support.megatron_shards import megatron_ranks


@pytest.fixture
def transport() -> Iterator[InMemoryTransport]:
    agent = InMemoryTransport("trainer")
    yield agent
    agent.close()


@pytest.mark.parametrize("experts", ["grouped", "sequential", "legacy"])
@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_experts_over_ep_and_etp_are_sent_twice(
    transport: InMemoryTransport, family: str, experts: str
) -> None:
    """TP 4, EP 2, ETP 2 and PP 2; what the trainer changed meanwhile arrives with the second."""
    config = moe_config(family)
    hf = hf_tensors(config)
    stages = [[[0]], [[1]]]
    ranks = megatron_ranks(
        hf, config, tp_size=4, ep_size=2, etp_size=2, stages=stages, experts=experts
    )
    with (
        served(FakeEngine()) as engine,
        WeightSender.from_megatron(
            ranks, config, engines=engine.url, token=TOKEN, transport=transport
        ) as sender,
    ):
        for version in (1, 2):
            sender.update(version)
            assert sorted(engine.weights) == sorted(hf)
            for name, tensor in hf.items():
                assert torch.equal(engine.weights[name], version * tensor), name
            for rank in ranks:
                for chunk in rank.chunks:
                    for shard in chunk.tensors.values():
                        shard.mul_(2)
    assert engine.models[0]["moe_intermediate_size"] == 8


def test_a_rank_of_another_job_is_named(transport: InMemoryTransport) -> None:
    config = moe_config()
    ranks = megatron_ranks(hf_tensors(config), config, tp_size=2, ep_size=2, etp_size=1)
    wrong = [ranks[0], replace(ranks[1], ep_size=4)]
    with pytest.raises(SourceError, match=r"at tp 1/2.*ep 1/4.*ep 4, etp 1.*at tp 0/2.*ep 2, etp"):
        WeightSender.from_megatron(
            wrong, config, engines="http://127.0.0.1:1", token=TOKEN, transport=transport
        )
