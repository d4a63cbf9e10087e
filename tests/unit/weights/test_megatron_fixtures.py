"""Native Megatron shards written by real Megatron jobs rebuild their HF tensors bit for bit.

One test per case of the fixture folder (`MEGATRON_FIXTURES`, or the committed subsets).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine_plugins.weights.megatron_names import MegatronNames
from engine_plugins.weights.megatron_rank import strip_wrappers
from engine_plugins.weights.megatron_source import megatron_boxes
from engine_plugins.weights.placement import assemble
from tests.support.fetched import fetched
from tests.support.megatron_fixtures import MegatronCase, fixture_folders, megatron_cases

CASES = [case for folder in fixture_folders() for case in megatron_cases(folder)]


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
