"""Draft models of this environment's engine take what a trainer offers, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine_plugins.weights.loader.coverage import left_out_by_design, prediction_layers
from engine_plugins.weights.sources.megatron.source import megatron_boxes
from engine_plugins.weights.sources.torch_source import hf_boxes
from tests.support.loader_maps import (
    PlayedEngine,
    land,
    loaded,
    logical,
    played_engine,
    same_bits,
)
from tests.support.megatron_fixtures import MegatronCase, fixture_folders, megatron_cases

pytestmark = pytest.mark.loader

CASES = [
    case
    for folder in fixture_folders()
    for case in megatron_cases(folder)
    if case.config.get("num_nextn_predict_layers")
]
HIDDEN, VOCABULARY, DRAFTED = 64, 320, 160
HEAD = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "dtype": "float32",
    "draft_vocab_size": DRAFTED,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}
"""An EAGLE-3 head for a Llama of this width."""
TARGET = {**HEAD, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 8}


@pytest.fixture(scope="module")
def engine() -> Iterator[PlayedEngine]:
    with played_engine() as engine:
        yield engine


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prediction_layers_of_a_megatron_job_land_in_the_draft_model(
    engine: PlayedEngine, case: MegatronCase, tmp_path: Path, tp_size: int
) -> None:
    """What the target's engine is told to leave out is what the draft takes, all of it."""
    shutil.copy(case.hf_folder / "config.json", tmp_path)
    offered = [megatron_boxes(rank, case.config) for rank in case.ranks()]
    expected = case.expected()
    predicting = prediction_layers(SimpleNamespace(**case.config))
    own = {name for name in expected if left_out_by_design(name, tied=False, predicting=predicting)}
    for tp_rank in range(tp_size):
        with engine.rank(tmp_path, tp_size=tp_size, tp_rank=tp_rank, draft=tmp_path) as rank:
            live = rank.model()
            wanted = loaded(live, expected)
            assert rank.trace(logical(expected)).sources() >= own
            targets = expected.keys() - own
            landed = land(rank, live, offered, spared=targets)
            assert landed.report.direct_bytes > 0
            assert landed.through_the_loader == []
            for name, parameter in live.named_parameters():
                assert same_bits(parameter, wanted[name]), name


def eagle_head() -> dict[str, torch.Tensor]:
    """Random tensors under the names of an EAGLE-3 head's checkpoint."""
    matrices = {
        "fc": (HIDDEN, 3 * HIDDEN),
        "embed_tokens": (VOCABULARY, HIDDEN),
        "lm_head": (DRAFTED, HIDDEN),
        **{f"midlayer.self_attn.{part}_proj": (HIDDEN, 2 * HIDDEN) for part in "qkv"},
        "midlayer.self_attn.o_proj": (HIDDEN, HIDDEN),
        **{f"midlayer.mlp.{part}_proj": (96, HIDDEN) for part in ("gate", "up")},
        "midlayer.mlp.down_proj": (HIDDEN, 96),
        "norm": (HIDDEN,),
        "midlayer.hidden_norm": (HIDDEN,),
        "midlayer.input_layernorm": (HIDDEN,),
        "midlayer.post_attention_layernorm": (HIDDEN,),
    }
    tensors = {f"{name}.weight": torch.randn(shape) for name, shape in matrices.items()}
    return tensors | {"d2t": torch.arange(DRAFTED)}


@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_eagle_head_lands_in_the_draft_model(
    engine: PlayedEngine, tmp_path: Path, tp_size: int
) -> None:
    """Its names are its own, and the map of its vocabulary is a tensor of whole numbers."""
    folders = {"target": TARGET, "draft": HEAD}
    for name, config in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    target, draft = (tmp_path / name for name in folders)
    expected = eagle_head()
    if engine.kind == "sglang":  # an attribute there, which its workers read when they start
        del expected["d2t"]
    offered = [hf_boxes({name: tensor.clone() for name, tensor in expected.items()})]
    for tp_rank in range(tp_size):
        with engine.rank(target, tp_size=tp_size, tp_rank=tp_rank, draft=draft) as rank:
            live = rank.model()
            wanted = loaded(live, expected)
            assert land(rank, live, offered).report.direct_bytes > 0
            for name, parameter in live.named_parameters():
                assert same_bits(parameter, wanted[name]), name
