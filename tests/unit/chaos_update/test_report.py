"""What counts as held, and a table to which parts add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos_update.cases import Case
from tests.chaos_update.episode import Result
from tests.chaos_update.report import keep, kept, summary, table


def _result(fault: str = "proxy_504", *, end: str = "repaired", wrong: int = 0) -> Result:
    case = Case(
        engine="vllm",
        tensor_parallel=1,
        api_servers=2,
        wire="tcp",
        dtype="float32",
        mode="staged",
        commit="one",
        phase="pull",
        fault=fault,
    )
    return Result(case=case, tries=1, reached=True, answers=10, wrong=wrong, end=end, took_s=9.6)


@pytest.mark.parametrize(
    ("fault", "end", "holds"),
    [
        ("proxy_504", "repaired", True),
        ("proxy_504", "unrepaired", False),
        ("deadline_50ms", "fenced", False),
        ("deadline_50ms", "dead", False),
        ("trainer_hung", "fenced", True),
        ("trainer_hung", "dead", False),
        ("worker_stopped", "dead", False),
        ("worker_killed", "dead", True),
        ("worker_killed", "unrepaired", False),
    ],
)
def test_how_a_case_may_end(fault: str, end: str, holds: bool) -> None:
    """Dead only if something was killed, fenced for good only if a trainer stood still."""
    assert _result(fault, end=end).holds is holds


def test_a_wrong_answer_or_a_lie_never_holds() -> None:
    """However the case ends."""
    assert not _result(wrong=1).holds
    lying = _result()
    lying.lying = 1
    assert not lying.holds


def test_parts_add_up_to_one_table(tmp_path: Path) -> None:
    """In the order of the cases; of one that was run again the last counts."""
    file = tmp_path / "results.jsonl"
    keep(file, 7, _result())
    keep(file, 3, _result(wrong=4))
    keep(file, 7, _result("trainer_killed"))
    results = kept(file)
    assert list(results) == [3, 7]
    assert results[7].case.fault == "trainer_killed"
    assert "20 answers, 4 wrong" in summary(list(results.values()))
    head, _, first, second = table(results).splitlines()
    assert head.count("|") == first.count("|")
    assert first.startswith("| 3 | vllm")
    assert "**repaired**" in first
    assert second.startswith("| 7 |")
    assert "**" not in second


def test_what_was_not_reached_says_so() -> None:
    """It proves nothing."""
    result = _result()
    result.reached = False
    assert "not reached" in table({1: result})
    assert "1 not reached" in summary([result])
