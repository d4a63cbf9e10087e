"""Growth is found under noise, and jumps are not taken for growth."""

from __future__ import annotations

import random

import pytest

from tests.soak.report import MEMORY_LIMIT, Slope, slopes
from tests.soak.runs import Run
from tests.soak.sample import Held
from tests.soak.slopes import growth


def test_growth_under_noise() -> None:
    """Some KiB per step under hundreds of KiB of noise."""
    chance = random.Random(7)
    samples = [1e9 + 9000 * step + chance.uniform(-3e5, 3e5) for step in range(250)]
    assert growth(samples) == pytest.approx(9000, rel=0.1)


def test_a_late_jump_is_no_growth() -> None:
    """An allocator takes a region once; a line by least squares would tilt."""
    assert growth([1e9] * 200 + [1.01e9] * 50) == 0


@pytest.mark.parametrize(
    ("what", "beside", "alone", "holds"),
    [
        ("memory", MEMORY_LIMIT - 1, None, True),
        ("memory", MEMORY_LIMIT + 1, None, False),
        ("memory", MEMORY_LIMIT + 1, 100, True),
        ("memory", MEMORY_LIMIT + 1, -100, False),
        ("descriptors", 0.0, 0.0, True),
        ("descriptors", 1.0, 0.0, False),
        ("files", 0.05, None, False),
    ],
)
def test_what_may_grow(what: str, beside: float, alone: float | None, holds: bool) -> None:
    """Memory by less than 8 KiB beyond the control, counts not at all."""
    assert Slope(what=what, of="core", beside=beside, alone=alone).holds is holds


def test_the_warm_up_is_left_out() -> None:
    """What fills in the first 50 steps and stays does not count."""
    held = [
        Held(
            memory={"core": 10**9},
            descriptors={"core": min(step, 50)},
            threads={"core": 4},
            files={"temporary folder": step},
        )
        for step in range(301)
    ]
    found = {slope.what: slope for slope in slopes(Run(held=held), Run(held=held[:1] * 4))}
    assert {what for what, slope in found.items() if not slope.holds} == {"files"}
    assert found["files"].beside == 1
