"""What a step takes at its peak, by the kernel's own mark, with memory that is really touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from engine_plugins.prefill_gate.step_memory import DeviceStepMemory, HostStepMemory, step_memory
from tests.support.engine_server import ROOT
from tests.support.measured_layers import MIB, PINNED_ALLOCATOR

PROGRAM = """
import gc, json
from engine_plugins.prefill_gate.step_memory import HostStepMemory

def touched(mebibytes):
    block = bytearray(mebibytes << 20)
    block[::4096] = b"x" * len(block[::4096])
    return block

memory = HostStepMemory(ranks=1)
said = {"before": memory.peak_bytes()}
memory.start()
block = touched(32)
del block
said["freed"] = memory.peak_bytes()
memory.start()
said["nothing"] = memory.peak_bytes()
memory.start()
said["held_before"] = memory.figures().used_bytes
kept = touched(16)
said["kept"] = memory.peak_bytes()
said["held"] = memory.figures().used_bytes
gc.disable()
knot = [kept]
knot.append(knot)
del kept, knot
said["tied"] = memory.figures().used_bytes
memory.give_back()
said["given_back"] = memory.figures().used_bytes
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    """What a process of its own measures, whose allocator returns what is freed."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, **PINNED_ALLOCATOR},
        capture_output=True,
        check=True,
        text=True,
    )
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def test_a_peak_is_what_was_touched_between_start_and_now(said: dict[str, int]) -> None:
    """Freed again or not; a step of nothing takes nothing. The kernel counts pages in batches."""
    assert said["freed"] == pytest.approx(32 * MIB, abs=MIB)
    assert said["nothing"] < MIB
    assert said["kept"] == pytest.approx(16 * MIB, abs=MIB)


def test_before_any_start_nobody_can_say(said: dict[str, int]) -> None:
    """Which is not 0."""
    assert said["before"] == -1


def test_what_is_in_use_follows_what_is_held(said: dict[str, int]) -> None:
    """And what only the collector can free leaves when memory is given back."""
    assert said["held"] - said["held_before"] == pytest.approx(16 * MIB, abs=MIB)
    assert said["tied"] == pytest.approx(said["held"], abs=MIB)
    assert said["held"] - said["given_back"] >= 15 * MIB


def test_ranks_share_what_is_free() -> None:
    """Each may take its part of it."""
    alone, shared = (HostStepMemory(ranks=ranks).figures() for ranks in (1, 4))
    room = [each.cap_bytes - each.used_bytes for each in (alone, shared)]
    assert room[1] == pytest.approx(room[0] / 4, rel=0.2)


def test_memory_is_measured_where_the_rank_computes() -> None:
    """On the host, or on its GPU."""
    assert isinstance(step_memory(torch.device("cpu"), ranks=2), HostStepMemory)
    device = step_memory(torch.device("cuda", 0), ranks=2)
    assert isinstance(device, DeviceStepMemory)
    assert device.peak_bytes() == -1
