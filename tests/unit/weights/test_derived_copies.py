"""What an engine derives from its parameters is made anew when these were landed in directly."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.loader_maps import PlayedEngine, played_engine, receiving, same_bits, update
from tests.support.megatron_fixtures import megatron_cases
from tests.support.source_ranks import offered_tensors

pytestmark = pytest.mark.loader

DERIVED = ("W_UK_T", "W_UV", "w_kc", "w_vc")
"""Copies that latent attention keeps of its up-projection, in either engine."""

COMMITTED = Path(__file__).parents[2] / "fixtures" / "megatron"
CASE = next(case for case in megatron_cases(COMMITTED) if case.config.get("kv_lora_rank"))


@pytest.fixture(scope="module")
def engine() -> Iterator[PlayedEngine]:
    with played_engine() as engine:
        yield engine


def derived(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of them, by the name of their module."""
    found = {
        f"{name}.{each}": getattr(module, each, None)
        for name, module in model.named_modules()
        for each in DERIVED
    }
    return {name: each.clone() for name, each in found.items() if isinstance(each, torch.Tensor)}


def test_latent_attention_is_brought_up_to_date(engine: PlayedEngine, tmp_path: Path) -> None:
    """After an update through the loader and one straight into parameters, as after the loader."""
    shutil.copy(CASE.hf_folder / "config.json", tmp_path)
    values = {name: tensor.clone() for name, tensor in CASE.expected().items()}
    outcomes = {}
    for direct in (True, False):
        memory = {name: torch.full_like(tensor, 0.1) for name, tensor in values.items()}
        with ExitStack() as stack:
            rank = stack.enter_context(engine.rank(tmp_path, tp_size=1, tp_rank=0))
            trainer = stack.enter_context(offered_tensors(memory))
            model = rank.model()
            installer = rank.installer(model)
            receiver = stack.enter_context(receiving(installer, direct=direct))
            update(receiver, [trainer])
            before = derived(model)
            for name, tensor in values.items():
                memory[name].copy_(tensor)
            report = update(receiver, [trainer])
            outcomes[direct] = derived(model)
        assert (report.direct_bytes > 0) == direct
        assert not any(same_bits(before[name], each) for name, each in outcomes[direct].items())
    assert outcomes[True]
    for name, tensor in outcomes[True].items():
        assert same_bits(tensor, outcomes[False][name]), name
