"""What four processes hold of a DTensor is, put together, what torch gathers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.dtensor_rank import CASES, WORLD_SIZE

PROJECT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each process found wrong, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = subprocess.Popen(
        [sys.executable, "-m", "tests.support.dtensor_rank", str(folder)],
        cwd=PROJECT,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        _, errors = ranks.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ranks.pid, signal.SIGKILL)
    assert ranks.returncode == 0, errors
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
        "from engine_plugins.weights.torch_source import hf_boxes; "
        "hf_boxes({'w': torch.zeros(2)}); new = set(sys.modules) - before; "
        "print([m for m in new if m.startswith(('torch.distributed.tensor', "
        "'torch.distributed.fsdp'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
