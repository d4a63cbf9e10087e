"""A Qwen3-30B-A3B-shaped model by the roles of its parameters; config only, no memory."""

from __future__ import annotations

import time
from collections import Counter

from engine_plugins.weights.sources.megatron.layout import Role
from engine_plugins.weights.sources.megatron.names import MegatronNames, classified
from engine_plugins.weights.sources.megatron.source import megatron_boxes
from tests.support.qwen3_30b import CONFIG, EXPERTS, LAYERS, NARROW, rank_of


def test_every_parameter_has_its_role() -> None:
    """12,627 parameters, none unknown; the tensors are on meta and are never read."""
    rank, names = rank_of(CONFIG, device="meta"), MegatronNames(CONFIG)
    roles = Counter(
        classified(native, names.find(native, rank, chunk.global_layers), rank, None).role
        for chunk in rank.chunks
        for native in chunk.tensors
    )
    assert roles == {
        Role.EXPERT_COLUMN: 6144,
        Role.EXPERT_ROW: 6144,
        Role.REPLICATED: 241,
        Role.ROW: 48,
        Role.FUSED_QKV: 48,
        Role.VOCABULARY: 1,
        Role.COLUMN: 1,
    }
    assert roles.total() == 12_627


def test_the_whole_model_is_mapped_to_every_hf_tensor() -> None:
    """18,867 HF tensors, of narrow matrices, in processor time that a slow machine has too."""
    rank = rank_of(NARROW)
    started = time.process_time()
    boxes = megatron_boxes(rank, NARROW)
    seconds = time.process_time() - started
    assert len({box.name for box in boxes}) == 18_867
    assert seconds < 3.0, "of which about 0.5 s are needed; one of four EP ranks needs a quarter"


def test_an_expert_parallel_rank_has_its_share_of_the_experts() -> None:
    boxes = megatron_boxes(rank_of(NARROW, ep_size=4), NARROW)
    experts = [box for box in boxes if ".experts." in box.name]
    assert len(experts) == LAYERS * EXPERTS // 4 * 3
