"""Megatron shares of one process reach an engine as the HF model that they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine_plugins import MegatronRule
from engine_plugins.errors import SourceError, UnsupportedError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.sources.megatron.families import FAMILIES
from engine_plugins.weights.sources.megatron.rank import MegatronRank
from engine_plugins.weights.sources.megatron.rules import Rule
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.fake_engine import TOKEN, FakeEngine, served
from tests.support.megatron_fixtures import MegatronCase, fixture_folders
from tests.support.megatron_hf import dense_config, hf_tensors, moe_config
from tests.support.megatron_shards import megatron_ranks
from tests.support.overlapping_megatron import DistributedDataParallel
from tests.unit.weights.test_megatron_rank import gpt_model


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
    copies = 0
    if experts == "legacy":
        copies = sum(
            tensor.nbytes
            for rank in ranks
            for chunk in rank.chunks
            for name, tensor in chunk.tensors.items()
            if name.endswith(("experts.weight1", "experts.weight2"))
        )
    with (
        served(FakeEngine()) as engine,
        WeightSender.from_megatron(
            ranks, config, engines=engine.url, token=TOKEN, transport=transport
        ) as sender,
    ):
        for version in (1, 2):
            report = sender.update(version)
            assert report.slot_bytes == (copies,), "legacy experts are turned round, so copied"
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


@pytest.mark.parametrize("unwrapped", [False, True])
def test_what_the_next_forward_pass_would_gather_is_sent_new(
    transport: InMemoryTransport, unwrapped: bool
) -> None:
    """With `overlap_param_gather` half of each parameter is that of the step before."""
    config = dense_config("llama")
    hf = hf_tensors(config)
    (rank,) = megatron_ranks(hf, config)
    tensors = {name: tensor.clone() for name, tensor in rank.chunks[0].tensors.items()}
    wrapper = DistributedDataParallel(gpt_model(tensors, list(rank.chunks[0].global_layers)))
    chunk = wrapper.module if unwrapped else wrapper
    with (
        served(FakeEngine()) as engine,
        WeightSender.from_megatron(
            MegatronRank.from_model([chunk], tp_rank=0, tp_size=1),
            config,
            engines=engine.url,
            token=TOKEN,
            transport=transport,
        ) as sender,
    ):
        for version in (1, 2):
            wrapper.step()
            sender.update(version)
            for name, tensor in hf.items():
                assert torch.equal(engine.weights[name], 2**version * tensor), name


def test_interleaved_experts_are_sent_as_they_are_meant(transport: InMemoryTransport) -> None:
    """`moe_mlp_glu_interleave_size`: gate and up by turns, in grouped experts alone."""
    config = moe_config("glm4_moe")
    hf = hf_tensors(config)
    ranks = [
        replace(
            rank,
            chunks=[
                replace(
                    chunk,
                    glu_interleave=2,
                    tensors={
                        name: _by_turns(tensor) if ".experts.linear_fc1" in name else tensor
                        for name, tensor in chunk.tensors.items()
                    },
                )
                for chunk in rank.chunks
            ],
        )
        for rank in megatron_ranks(hf, config, tp_size=2, ep_size=2, etp_size=2)
    ]
    with (
        served(FakeEngine()) as engine,
        WeightSender.from_megatron(
            ranks, config, engines=engine.url, token=TOKEN, transport=transport
        ) as sender,
    ):
        sender.update(1)
        for name, tensor in hf.items():
            assert torch.equal(engine.weights[name], tensor), name


def _by_turns(fc1: torch.Tensor) -> torch.Tensor:
    """Two rows of the gate, two of up, and so on."""
    gate, up = (half.unflatten(0, (-1, 2)) for half in fc1.chunk(2))
    return torch.stack([gate, up], 1).flatten(0, 2)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next"])
def test_what_no_view_can_be_is_copied_anew_for_every_update(
    transport: InMemoryTransport, family: str
) -> None:
    """GPT-OSS' experts are turned round, and a norm of Qwen3-Next holds its weight less one."""
    folder = fixture_folders()[-1]
    case = MegatronCase(folder / "cases" / f"{family}_tp2_pp1_ep1")
    if not case.folder.exists():
        pytest.skip(f"{folder} has no {family}")
    hf, ranks = case.expected(), list(case.ranks())
    with (
        served(FakeEngine()) as engine,
        WeightSender.from_megatron(
            ranks, case.config, engines=engine.url, token=TOKEN, transport=transport
        ) as sender,
    ):
        for version in (1, 2):
            sender.update(version)
            assert sorted(engine.weights) == sorted(hf)
            for name, tensor in hf.items():
                less = 1 if name.endswith("linear_attn.norm.weight") else 0
                wanted = version * (tensor - less) + less
                torch.testing.assert_close(engine.weights[name], wanted, msg=name)
            for rank in ranks:
                for chunk in rank.chunks:
                    for shard in chunk.tensors.values():
                        shard.mul_(2)


def said(rule: Rule) -> MegatronRule:
    """A rule of ours as a user would give it, its shapes left out."""
    rows: Any = rule.rows.value
    return MegatronRule(rule.hf, cut=rule.role.cut.value if rule.role else None, rows=rows)


def test_rules_of_one_sender_are_sent_by(transport: InMemoryTransport) -> None:
    """A family that nobody knows, its last parameter said in place; without it, nothing is sent."""
    config = dense_config("llama") | {"model_type": "nobody_knows"}
    hf = hf_tensors(dense_config("llama"))
    ranks = megatron_ranks(hf, config, tp_size=2)
    down = "decoder.layers.{layer}.mlp.linear_fc2.weight"
    rules = {native: said(rule) for native, rule in FAMILIES["llama"].rules(config).items()}
    assert down in rules
    with served(FakeEngine()) as engine:
        with pytest.raises(UnsupportedError, match="nobody_knows"):
            WeightSender.from_megatron(
                ranks, config, engines=engine.url, token=TOKEN, transport=transport
            )
        with pytest.raises(SourceError, match=r"linear_fc2\.weight"):
            WeightSender.from_megatron(
                ranks,
                config,
                engines=engine.url,
                token=TOKEN,
                transport=transport,
                rules={name: rule for name, rule in rules.items() if name != down},
            )
        with WeightSender.from_megatron(
            ranks, config, engines=engine.url, token=TOKEN, transport=transport, rules=rules
        ) as sender:
            sender.update(1)
        assert sorted(engine.weights) == sorted(hf)
        assert all(torch.equal(engine.weights[name], tensor) for name, tensor in hf.items())
