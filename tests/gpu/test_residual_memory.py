"""What NVML tells of this process against what torch knows of it, on a real GPU.

Nothing here has run yet. Where the driver's pids cannot be proven to be ours (a container without
the host's pids) there is no exact figure, and the tests are skipped with the reason that was found.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch

from engine_plugins.sleep.gpu_device import gpu_device, rank_memory
from engine_plugins.sleep.gpu_processes import PidProof, attribute
from engine_plugins.sleep.memory_report import Rung
from engine_plugins.sleep.nvidia_smi import smi_processes
from engine_plugins.sleep.nvml import Nvml
from engine_plugins.sleep.rank_memory import RankMemory
from engine_plugins.sleep.residual_memory import assess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this process has no CUDA device"),
]

MIB = 1 << 20
GIB = 1 << 30
DEVICE = torch.device("cuda:0")
TOLERANCE = 64 * MIB


@pytest.fixture
def memory() -> RankMemory:
    """This process as a rank, with its context made and nothing cached."""
    torch.zeros(1, device=DEVICE)
    torch.cuda.empty_cache()
    rank = rank_memory(0, DEVICE)
    sample = rank.sample()
    if sample.quality != "exact":
        pytest.skip(f"no exact figure: {sample.reason}: {sample.detail}")
    return rank


def held(memory: RankMemory) -> int:
    result = memory.settled()
    assert result.settled
    assert result.sample.quality == "exact"
    assert result.sample.resident_bytes is not None
    return result.sample.resident_bytes


def test_the_figure_follows_torchs_own(memory: RankMemory) -> None:
    """Both ways, and never below what torch has reserved."""
    before, reserved = held(memory), torch.cuda.memory_reserved(DEVICE)
    tensor = torch.empty(3 * GIB, dtype=torch.uint8, device=DEVICE)
    grown = torch.cuda.memory_reserved(DEVICE) - reserved
    assert grown >= 3 * GIB
    assert held(memory) - before == pytest.approx(grown, abs=TOLERANCE)
    assert held(memory) >= torch.cuda.memory_reserved(DEVICE)
    del tensor
    torch.cuda.empty_cache()
    assert held(memory) == pytest.approx(before, abs=TOLERANCE)


def test_the_whole_gpu_holds_no_less(memory: RankMemory) -> None:
    tensor = torch.empty(GIB, dtype=torch.uint8, device=DEVICE)
    assert memory.device is not None
    whole = Nvml().whole_gpu(memory.device)
    assert whole.quality == "upper_bound"
    assert whole.resident_bytes is not None
    assert whole.resident_bytes + TOLERANCE >= held(memory)
    del tensor


def test_nvidia_smi_tells_the_same(memory: RankMemory) -> None:
    tensor = torch.empty(GIB, dtype=torch.uint8, device=DEVICE)
    told: Rung = attribute(smi_processes(gpu_device(0)), memory.processes, PidProof())
    assert told.quality == "exact", told.detail
    assert told.resident_bytes == pytest.approx(held(memory), abs=TOLERANCE)
    del tensor


def _hold(pipe: Connection, nbytes: int) -> None:
    tensor = torch.ones(nbytes, dtype=torch.uint8, device=DEVICE)
    pipe.send(int(tensor[0]))
    pipe.recv()


def test_a_childs_memory_is_the_ranks(memory: RankMemory) -> None:
    before = held(memory)
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    child = spawning.Process(target=_hold, args=(there, 2 * GIB))
    child.start()
    assert here.recv() == 1
    assert held(memory) - before >= 2 * GIB
    here.send("enough")
    child.join()
    assert held(memory) == pytest.approx(before, abs=TOLERANCE)


def test_memory_over_the_baseline_fails_until_it_is_given_back(memory: RankMemory) -> None:
    assert memory.take_baseline() is not None

    def verdict() -> tuple[str, str]:
        report = assess(
            [memory.row(memory.settled())],
            policy="enforce",
            threshold_bytes=1 << 50,
            over_baseline_bytes=GIB,
            measured_at=0.0,
        )
        return report.verdict, report.reason

    tensor = torch.empty(2 * GIB, dtype=torch.uint8, device=DEVICE)
    assert verdict() == ("fail", "over_baseline")
    del tensor
    torch.cuda.empty_cache()
    assert verdict() == ("pass", "")
