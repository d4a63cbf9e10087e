"""What four processes hold of a DTensor is, put together, what torch gathers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.dtensor_rank import CASES, WORLD_SIZE
from tests.support.process_group import output_of_ranks

PROJECT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each process found wrong, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    output_of_ranks("tests.support.dtensor_rank", str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("case", CASES)
def test_the_shares_of_all_ranks_are_the_whole(
    told: list[dict[str, str | None]], case: str
) -> None:
    """Bit for bit, in place, on every rank; or refused by name."""
    assert [rank[case] for rank in told] == [None] * WORLD_SIZE


def test_a_trainer_without_dtensors_does_not_pay_for_them() -> None:
    """Neither the sender nor its source of plain tensors imports torch.distributed.tensor."""
    probe = (
        "import sys, torch; before = set(sys.modules); from engine_plugins import WeightSender; "
        "from engine_plugins.weights.sources.torch_source import hf_boxes; "
        "hf_boxes({'w': torch.zeros(2)}); new = set(sys.modules) - before; "
        "print([m for m in new if m.startswith(('torch.distributed.tensor', "
        "'torch.distributed.fsdp'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
