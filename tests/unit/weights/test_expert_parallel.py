"""An expert-parallel rank of this environment's engine fetches its own experts and no others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.loader.coverage import engine_steps
from engine_plugins.weights.loader.needed import needed_boxes
from engine_plugins.weights.planning.logical_tensors import logical_tensors
from engine_plugins.weights.planning.plan import build_plan
from engine_plugins.weights.planning.plan_data import Step
from engine_plugins.weights.sources.megatron.source import megatron_boxes
from tests.support.loader_maps import PlayedRank, played_engine
from tests.support.qwen3_30b import CONFIG, EXPERTS, LAYERS, rank_of
from tests.support.source_ranks import offered_boxes

pytestmark = pytest.mark.loader

HIDDEN, FFN, HEAD_DIM, HEADS, GROUPS, VOCABULARY = (
    int(str(CONFIG[key]))
    for key in (
        "hidden_size",
        "moe_intermediate_size",
        "head_dim",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
)
"""Of Qwen3-30B-A3B."""
ITEM = 4
"""Bytes of a float32."""
SERVED = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def trainer() -> list[list[SourceBox]]:
    """Four ranks of a Megatron job, EP 4: each has a quarter of the experts and all of the rest.

    Nobody reads their memory, so it takes none, and they may share its addresses.
    """
    first = rank_of(CONFIG, ep_size=4)
    return [megatron_boxes(replace(first, ep_rank=number), CONFIG) for number in range(4)]


def steps_of(
    rank: PlayedRank, tensors: Sequence[LogicalTensor], manifests: Sequence[SourceManifest]
) -> tuple[Step, ...]:
    """What a rank would fetch, module by module."""
    trace = rank.trace(tensors)
    steps, unused = engine_steps(trace, tensors, rank.rules)
    assert all(".experts." in name for name in unused), "another rank's, or nobody's"
    return build_plan(manifests, steps, needed_boxes(trace, tensors)).steps


def test_each_rank_of_two_fetches_half_of_the_experts(tmp_path: Path) -> None:
    """18,867 tensors at TP 2 with expert parallelism: to the byte, and each expert once."""
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **SERVED}))
    with offered_boxes(*trainer()) as ranks:
        manifests = [rank.manifest for rank in ranks]
    tensors = logical_tensors(manifests)
    assert len(tensors) == 18_867
    expert = 3 * HIDDEN * FFN * ITEM
    shared_by_two = LAYERS * 2 * HEADS * HEAD_DIM * HIDDEN  # queries and output projection
    shared_by_two += LAYERS * 2 * GROUPS * HEAD_DIM * HIDDEN
    shared_by_two += 2 * VOCABULARY * HIDDEN
    on_both = LAYERS * (2 * HIDDEN + 2 * HEAD_DIM + EXPERTS * HIDDEN) + HIDDEN
    fetched: list[str] = []
    with played_engine() as engine:
        for tp_rank in range(2):
            with engine.rank(tmp_path, tp_size=2, tp_rank=tp_rank, expert_parallel=True) as rank:
                steps = steps_of(rank, tensors, manifests)
            experts = [step for step in steps if any(".experts" in name for name in step.modules)]
            assert len(experts) == LAYERS
            for step in experts:
                assert step.bytes_needed == step.bytes_to_move == EXPERTS // 2 * expert
                fetched += [tensor.name for tensor in step.tensors]
            others = sum(step.bytes_needed for step in steps) - sum(
                step.bytes_needed for step in experts
            )
            assert others == (shared_by_two // 2 + on_both) * ITEM
    assert sorted(fetched) == sorted(t.name for t in tensors if ".experts." in t.name)
