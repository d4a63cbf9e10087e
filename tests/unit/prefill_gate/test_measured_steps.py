"""Predictions and refusals over real tensors, with peaks that the kernel has measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.engine_server import ROOT
from tests.support.measured_layers import MIB, PINNED_ALLOCATOR


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What the program says."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.measured_layers"],
        cwd=ROOT,
        env={**os.environ, **PINNED_ALLOCATOR},
        capture_output=True,
        check=True,
        text=True,
    )
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def test_lengths_that_were_not_measured_are_predicted(report: dict[str, Any]) -> None:
    """Plain steps within 2 %, prompt logprobs within 1 %; of small steps, within half an MiB."""
    assert len(report["steps"]) == 6
    for kind, tokens, measured, predicted in report["steps"]:
        share = 0.01 if kind == "prompt_logprobs" else 0.02
        allowed = max(share * measured, MIB / 2)
        assert predicted == pytest.approx(measured, abs=allowed), (kind, tokens)


def test_what_would_exhaust_the_process_is_refused_and_what_is_said_to_fit_runs(
    report: dict[str, Any],
) -> None:
    """Under RLIMIT_AS: the allocator fails without the gate, and the largest prompt runs."""
    assert report["outcomes"] == ["reclaim", "too_large"]
    assert 300 < report["largest"] < 2000
    assert "allocate" in report["ungated"]
