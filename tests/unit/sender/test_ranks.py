"""Whatever one rank does, the others hear of it in seconds; who never comes is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine_plugins.sender.rank_wire import LOOK_S
from tests.support.meeting_rank import TOLD_BYTES
from tests.support.process_group import output_of_ranks

SOON_S = 10.0
"""Of a busy machine; what hangs takes far longer."""
COPIES = 3.5
"""Of what is told, that a rank may hold at once: as sent or received, and as read."""


def ends(tmp_path: Path, case: str, ranks: int, *heard: int) -> dict[int, dict[str, Any]]:
    """How ranks ended, by rank; by default all."""
    names = ",".join(str(rank) for rank in heard or range(ranks))
    said = output_of_ranks(
        "tests.support.meeting_rank", str(ranks), str(tmp_path / "rendezvous"), case, names
    )
    lines = [json.loads(line) for line in said.splitlines()]
    return {line["rank"]: line for line in lines}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("generator", "this rank cannot read one of its tensors"),
        ("function", "this rank cannot read one of its tensors"),
        ("config", "this config is on a disk that is gone"),
        ("quantization", "awq"),
        ("option", "meet_timeout_s is 'soon'"),
        ("between", "ZeroDivisionError: outside of any step"),
        ("unpackable", "object"),
        ("interrupt", "KeyboardInterrupt"),
        ("leave", "SystemExit: 4"),
    ],
)
def test_what_one_rank_raises_reaches_all(tmp_path: Path, case: str, words: str) -> None:
    """In a constructor's own work, in a step, between steps; its process lives on."""
    ended = ends(tmp_path, case, 3)
    for rank in (0, 2):
        assert words in ended[rank]["error"], ended
        assert "on trainer rank 1 of 3" in ended[rank]["error"]
    assert words.partition(":")[0] in ended[1]["error"]
    assert max(each["s"] for each in ended.values()) < SOON_S
    if case in ("interrupt", "leave"):
        assert ended[1]["kind"] == words.partition(":")[0]


def test_an_interrupt_ends_a_wait(tmp_path: Path) -> None:
    """Of rank 0 at once, of another one that waits soon, of the busy one when it is done."""
    ended = ends(tmp_path, "waiting", 3)
    assert ended[0]["kind"] == "KeyboardInterrupt"
    assert ended[0]["s"] < 3.0
    for rank in (1, 2):
        assert "on trainer rank 0 of 3: KeyboardInterrupt" in ended[rank]["error"]
    assert ended[2]["s"] < 3.5 + LOOK_S


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    """Within meet_timeout_s, with how to send from one rank alone; those that came say the same."""
    ended = ends(tmp_path, "absent", 3, 0, 2)
    assert "trainer rank 1 of 3 did not come to meet the others within 1 s" in ended[0]["error"]
    assert "new_group([0], use_local_synchronization=True)" in ended[0]["error"]
    assert "trainer rank 1 of 3 did not come" in ended[2]["error"]
    assert "use_local_synchronization=True" in ended[2]["error"]
    assert max(each["s"] for each in ended.values()) < SOON_S


def test_a_leading_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    ended = ends(tmp_path, "leader_absent", 3, 1, 2)
    for rank in (1, 2):
        assert "trainer rank 0 of 3 did not come" in ended[rank]["error"], ended
        assert f"new_group([{rank}], use_local_synchronization=True)" in ended[rank]["error"]


def test_a_rank_that_does_not_come_to_an_update_is_named(tmp_path: Path) -> None:
    """After the time that a step of another rank may take."""
    ended = ends(tmp_path, "late", 3, 0, 2)
    for rank in (0, 2):
        assert (
            "trainer rank 1 of 3 did not come to what the others had begun"
            in (ended[rank]["error"])
        )
        assert ended[rank]["s"] < SOON_S


def test_ranks_meet_anew_after_one_was_interrupted(tmp_path: Path) -> None:
    assert [each["value"] for each in ends(tmp_path, "anew", 3).values()] == [[0, 1, 2]] * 3


def test_groups_come_and_go_in_one_job(tmp_path: Path) -> None:
    """The store keeps what an earlier group left there; torch's own groups trip over it."""
    assert [each["value"] for each in ends(tmp_path, "again", 2).values()] == [12, 12]


def test_one_rank_sends_alone_by_the_advice_of_the_error(tmp_path: Path) -> None:
    assert ends(tmp_path, "alone", 2, 0)[0]["value"] == 1


def test_who_is_not_of_the_group_is_told_so(tmp_path: Path) -> None:
    ended = ends(tmp_path, "outsider", 2)
    assert ended[1]["kind"] == "SettingsError"
    assert "trainer rank 1 is not of the process_group" in ended[1]["error"]


@pytest.mark.parametrize("case", ["told", "dealt"])
def test_what_is_told_takes_its_own_size(tmp_path: Path, case: str) -> None:
    """Not that of all ranks together, on each; a dealt part is the rank's own."""
    ended = ends(tmp_path, case, 4)
    for rank, each in ended.items():
        assert each["value"]["size"] == TOLD_BYTES
        if case == "dealt":
            assert each["value"]["first"] == each["value"]["last"] == rank
        if rank:
            assert each["value"]["peak"] < COPIES * TOLD_BYTES, ended


def test_results_are_collected_in_bounded_batches(tmp_path: Path) -> None:
    """In the ranks' order, by the leading rank alone; what is empty is left out."""
    ended = ends(tmp_path, "collected", 4)
    assert ended[0]["value"] == [[0, 1000], [2, 2500, 3, 400]]
    assert [ended[rank]["value"] for rank in (1, 2, 3)] == [[], [], []]


def test_what_the_leading_rank_cannot_take_fails_on_all(tmp_path: Path) -> None:
    for each in ends(tmp_path, "refused", 3).values():
        assert "ValueError: no engine takes this" in each["error"]
