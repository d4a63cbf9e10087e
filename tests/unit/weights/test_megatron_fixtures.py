"""Native Megatron shards written by real Megatron jobs, bit for bit.

They rebuild their HF tensors, and they land in the parameters of every rank of this environment's
engine as its own loader would put the HF tensors there. One test per case of the fixture folder
(`MEGATRON_FIXTURES`, or the committed subsets).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from engine_plugins.weights.boxes.placement import assemble
from engine_plugins.weights.sources.megatron.names import MegatronNames
from engine_plugins.weights.sources.megatron.rank import strip_wrappers
from engine_plugins.weights.sources.megatron.source import megatron_boxes
from tests.support.fetched import fetched
from tests.support.loader_maps import (
    REFUSED,
    WHOLE_ROWS,
    PlayedEngine,
    land,
    loaded,
    played_engine,
    same_bits,
    uneven_sizes,
)
from tests.support.megatron_fixtures import (
    MegatronCase,
    fixture_folders,
    landing_folders,
    megatron_cases,
)

CASES = [case for folder in fixture_folders() for case in megatron_cases(folder)]
LANDING = [case for folder in landing_folders() for case in megatron_cases(folder)]

COMPUTED = {
    "deepseek": {"fused_qkv_a_proj_with_mqa"},
    "gpt_oss": {"routed_experts"},
    "gemma2": {
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "norm",
    },
}
"""Modules, by family, whose tensors an engine's loader joins, turns, or keeps otherwise as well."""
_NOT_ON_A_CPU = (
    "MoE backend supports the deployment configuration",  # vLLM: GPT-OSS cut finely
    "requires one of",  # SGLang: GPT-OSS, by its attention
    "requires platform support for Mamba",  # SGLang: Qwen3-Next
)
"""What engines say of models that they build on a GPU alone."""


@pytest.mark.parametrize("folder", fixture_folders(), ids=lambda folder: folder.name)
def test_the_fixture_folder_holds_cases(folder: Path) -> None:
    """An empty or missing folder must not look like success."""
    assert megatron_cases(folder), f"{folder} holds no cases/*/manifest.json"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shards_rebuild_the_hf_tensors(case: MegatronCase) -> None:
    """Names, dtypes and every bit equal the HF checkpoint's; nothing is missing or extra.

    Twice: put together from the boxes, and fetched by a plan from every rank's own manifest.
    """
    ranks = [megatron_boxes(rank, case.config) for rank in case.ranks()]
    expected = case.expected()
    for rebuilt in (assemble(box for boxes in ranks for box in boxes), fetched(ranks)):
        assert sorted(rebuilt) == sorted(expected)
        for name, tensor in expected.items():
            assert rebuilt[name].dtype == tensor.dtype, name
            assert torch.equal(rebuilt[name], tensor), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_our_names_are_those_of_megatron_bridge(case: MegatronCase) -> None:
    """Parameter by parameter, where the job that wrote the shards asked Bridge."""
    names = MegatronNames(case.config)
    for rank, said in zip(case.ranks(), case.manifest["ranks"], strict=True):
        for chunk, entry in zip(rank.chunks, said["files"], strict=True):
            for native, told in (said.get("name_map") or {}).get(str(entry["vp"]), {}).items():
                rule = names.find(strip_wrappers(native), rank, chunk.global_layers)
                if rule.hf:  # not a tied head's copy
                    hf = told["hf"]
                    bridge = {hf} if isinstance(hf, str) else set(hf.values())
                    assert set(rule.hf) == bridge, native


@pytest.fixture(scope="module")
def engine() -> Iterator[PlayedEngine]:
    with played_engine() as engine:
        yield engine


@pytest.fixture
def model(case: MegatronCase, tmp_path: Path) -> Path:
    """A model folder of the case with its config alone."""
    shutil.copy(case.hf_folder / "config.json", tmp_path)
    return tmp_path


@pytest.mark.loader
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("case", LANDING, ids=lambda case: case.name)
def test_shards_land_in_an_engines_parameters(
    engine: PlayedEngine,
    case: MegatronCase,
    model: Path,
    tp_size: int,
    record_property: Callable[[str, object], None],
) -> None:
    """On every rank: over other weights, all parameters end up as if the checkpoint were loaded.

    Modules land directly, but for those whose values the loader computes. What is moved is what the
    loader fills, to the byte, or whole rows where these are short. A size that the engine refuses
    must be one that it cannot share among the ranks, or a model that it builds on a GPU alone.
    """
    offered = [megatron_boxes(rank, case.config) for rank in case.ranks()]
    expected = case.expected()
    moved = needed = 0
    for tp_rank in range(tp_size):
        with ExitStack() as stack:
            try:
                rank = stack.enter_context(engine.rank(model, tp_size=tp_size, tp_rank=tp_rank))
                live = rank.model()
            except Exception as refusal:
                needs_gpu = any(said in str(refusal) for said in _NOT_ON_A_CPU)
                assert uneven_sizes(case.config, tp_size) or needs_gpu
                record_property(REFUSED, f"{engine.kind}: {refusal}")
                return
            wanted = loaded(live, expected)
            exact, filled_bytes, report, through_the_loader = land(rank, live, offered)
            assert report.direct_bytes > 0
            family = case.config["model_type"]
            computed = {name for of in COMPUTED if of in family for name in COMPUTED[of]}
            assert {module.rpartition(".")[2] for module in through_the_loader} <= computed
            for name, parameter in live.named_parameters():
                assert same_bits(parameter, wanted[name]), name
            assert exact.bytes_moved == exact.loader_bytes == filled_bytes
            assert exact.loader_bytes == report.direct_bytes + report.loader_bytes
            moved += report.bytes_moved
            needed += exact.loader_bytes
    assert moved >= needed
    if moved != needed:
        record_property(WHOLE_ROWS, f"{engine.kind}: needed {needed}, moved {moved}")
