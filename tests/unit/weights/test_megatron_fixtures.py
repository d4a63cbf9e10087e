"""Native Megatron shards written by real Megatron jobs rebuild their HF tensors bit for bit.

One test per case of the fixture folder (`MEGATRON_FIXTURES`, or the committed subsets). A
case of a family that is not supported yet is skipped, and says so.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine_plugins.weights.megatron_source import megatron_boxes
from engine_plugins.weights.placement import assemble
from tests.support.megatron_fixtures import MegatronCase, fixture_folders, megatron_cases

CASES = [case for folder in fixture_folders() for case in megatron_cases(folder)]


@pytest.mark.parametrize("folder", fixture_folders(), ids=lambda folder: folder.name)
def test_the_fixture_folder_holds_cases(folder: Path) -> None:
    """An empty or missing folder must not look like success."""
    assert megatron_cases(folder), f"{folder} holds no cases/*/manifest.json"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shards_rebuild_the_hf_tensors(case: MegatronCase) -> None:
    """Names, dtypes and every bit equal the HF checkpoint's; nothing is missing or extra."""
    rebuilt = assemble(box for rank in case.ranks() for box in megatron_boxes(rank, case.config))

    expected = case.expected()
    assert sorted(rebuilt) == sorted(expected)
    for name, tensor in expected.items():
        assert rebuilt[name].dtype == tensor.dtype, name
        assert torch.equal(rebuilt[name], tensor), name
