"""Which results of a row hold, and which do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.liveness.report import keep, kept, line
from tests.liveness.result import Result
from tests.liveness.rows import Row, rows

(FROZEN,) = [
    row for row in rows("vllm") if row.fault == "core_stopped" and row.phase == "pull"
]  # timeout_s 6
KILLED = replace(FROZEN, fault="core_killed")
FULL = replace(FROZEN, fault="disk_full")
GOOD: dict[str, Any] = {
    "reached": True,
    "told_s": 7.0,
    "told": "the core does not answer",
    "named": True,
    "state": "fenced",
    "true_s": 7.5,
    "door_s": 7.5,
    "repaired_s": 2.0,
}
GONE: dict[str, Any] = {**GOOD, "gone_s": 2.0, "ended": 0, "repaired_s": None}


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        (FROZEN, GOOD),
        (KILLED, GONE),
        (FULL, {**GOOD, "state": "serving"}),
    ],
)
def test_what_holds(row: Row, seen: dict[str, Any]) -> None:
    """The trainer was told in time, and the engine was repaired or its server has ended."""
    assert list(Result(row=row, **seen).violations()) == []


@pytest.mark.parametrize(
    ("row", "seen", "violation"),
    [
        (FROZEN, {"reached": False}, "not reached"),
        (FROZEN, {"told_s": 11.1}, "told late"),
        (FROZEN, {"told_s": None}, "not told"),
        (FROZEN, {"named": False}, "not named"),
        (FROZEN, {"true_s": 16.1}, "/state"),
        (FROZEN, {"true_s": None}, "/state"),
        (FROZEN, {"door_s": 16.1}, "requests held"),
        (FROZEN, {"late": True}, "published after"),
        (FROZEN, {"repaired_s": None}, "not repaired"),
        (FROZEN, {"repaired_s": None, "for_good": True}, "restart"),
        (FROZEN, {"gone_s": 3.0}, "the server has ended"),
        (FROZEN, {"wrong": 1}, "1 wrong"),
        (FROZEN, {"unfinished": ["update.7.tmp"]}, "update.7.tmp"),
        (FULL, {"state": "fenced"}, "nothing was touched"),
        (KILLED, {"gone_s": None}, "had not ended"),
        (KILLED, {"gone_s": 10.5}, "had not ended"),
        (KILLED, {"gone_s": 2.0, "left": ["process 7"]}, "process 7"),
    ],
)
def test_what_does_not(row: Row, seen: dict[str, Any], violation: str) -> None:
    """Each figure by itself is enough."""
    result = Result(row=row, **{**GOOD, **seen})
    assert violation in "; ".join(result.violations())
    assert violation in line(result)


def test_parts_add_up(tmp_path: Path) -> None:
    """Of a row that was made again the last result counts."""
    file = tmp_path / "results.jsonl"
    keep(file, Result(row=FROZEN, reached=False))
    keep(file, Result(row=KILLED, **GONE))
    keep(file, Result(row=FROZEN, **GOOD))
    found = kept(file)
    assert {row: result.holds for row, result in found.items()} == {FROZEN: True, KILLED: True}
