"""An update in place stays within its memory, on a model that is larger than the bound."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_plugins import WeightSender
from tests.support.engine_server import TOKEN
from tests.support.hf_reference import greedy
from tests.support.sized_models import sized_qwen3
from tests.support.vllm_server import vllm_server

pytestmark = pytest.mark.engine

PROMPT = [5, 6, 7, 8, 9]


def test_peak_and_buffers_stay_within_their_bounds(tmp_path: Path) -> None:
    """Peak over base below 3.5 of the largest module + 32 MiB; buffers below two; tokens right."""
    model = sized_qwen3()
    model.save_pretrained(tmp_path / "model")
    whole = sum(parameter.nbytes for parameter in model.parameters())
    with (
        vllm_server(tmp_path / "model", tmp_path / "server.log") as server,
        WeightSender.from_hf(
            model.named_parameters(), engines=server.url, token=TOKEN, config=model.config
        ) as sender,
    ):
        for version in (1, 2, 3):
            for parameter in model.parameters():
                parameter.data.mul_(0.97)
            report = sender.update(version)
            (plan,), (update,) = report.plans.values(), report.engines.values()
            largest = plan.ranks[0].largest_step_bytes
            bound = 3.5 * largest + (32 << 20)
            assert whole > bound, "the model is too small to show anything"
            assert plan.ranks[0].arena_bytes < 2 * largest
            assert largest < update.peak_extra_bytes < bound, f"update {version}"
            assert server.greedy(PROMPT, 8) == greedy(model, PROMPT, 8)
