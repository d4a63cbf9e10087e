"""Whether torch's allocator uses expandable segments: asked of the real allocator."""

from __future__ import annotations

import pytest
import torch

from engine_plugins.weights.hardware.expandable_segments import (
    asked_for,
    expandable_ranges,
    says_expandable,
)
from tests.support.after_import import run_after_import

CUDA_NAME, OTHER_NAME = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
ON, OFF = "expandable_segments:True", "expandable_segments:False"


def ask(*set_later: str) -> str | None:
    """In a process of its own: change the settings as a program does, then ask."""
    for settings in set_later:
        torch._C._accelerator_setAllocatorSettings(settings)
    return asked_for()


def test_the_allocator_is_believed_not_the_environment() -> None:
    """The variables stay as they were when a program changes the settings."""
    at_run_time = "a setting made at run time"
    cases: list[tuple[dict[str, str], list[str], str | None]] = [
        ({}, [], None),
        ({CUDA_NAME: f"max_split_size_mb:64,{ON}"}, [], f"{CUDA_NAME}=max_split_size_mb:64,{ON}"),
        ({OTHER_NAME: ON}, [], f"{OTHER_NAME}={ON}"),
        ({OTHER_NAME: OFF}, [], None),
        ({}, [ON], at_run_time),
        ({CUDA_NAME: OFF}, [ON], at_run_time),
        ({CUDA_NAME: ON}, [OFF], None),
        ({OTHER_NAME: ON}, [OFF, ON], f"{OTHER_NAME}={ON}"),
        # Both variables: torch 2.13 follows the older name.
        ({CUDA_NAME: ON, OTHER_NAME: OFF}, [], f"{CUDA_NAME}={ON}"),
        ({CUDA_NAME: OFF, OTHER_NAME: ON}, [], None),
    ]
    unset = dict.fromkeys((CUDA_NAME, OTHER_NAME))
    answers = run_after_import(ask, [({**unset, **environ}, later) for environ, later, _ in cases])
    assert [answer for answer, _ in answers] == [expected for _, _, expected in cases]


@pytest.mark.parametrize("name", [CUDA_NAME, OTHER_NAME])
def test_an_older_torch_that_cannot_be_asked_is_taken_by_its_environment(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("torch._C._accelerator_getAllocatorSettings")
    assert asked_for({name: ON}) == f"{name}={ON}"
    assert asked_for({name: OFF}) is None
    assert asked_for({}) is None


@pytest.mark.parametrize(
    ("settings", "on"),
    [
        ("expandable_segments:True", True),
        (" expandable_segments : True ", True),
        ("roundup_power2_divisions:[256:1,>:8],expandable_segments:True,backend:native", True),
        ("expandable_segments:True,expandable_segments:False", False),
        ("expandable_segments:False", False),
        ("not_expandable_segments:True", False),
        ("expandable_segments", False),
        ("", False),
    ],
)
def test_settings_are_read_as_torch_reads_them(settings: str, on: bool) -> None:
    assert says_expandable(settings) is on


def test_ranges_are_those_of_expandable_segments_alone() -> None:
    """Rows as torch.cuda.memory_snapshot() gives them; an older torch lacks the key."""
    segments = [
        {"address": 0x1000, "total_size": 0x800, "is_expandable": True},
        {"address": 0x9000, "total_size": 0x800, "is_expandable": False},
        {"address": 0xA000, "total_size": 0x800},
    ]
    assert expandable_ranges(segments) == [range(0x1000, 0x1800)]


def test_without_cuda_there_are_no_ranges() -> None:
    assert expandable_ranges() == []
