"""Which mode an update takes, by what its ranks would hold and what is surely free."""

from __future__ import annotations

import resource

import psutil
import pytest

from engine_plugins.errors import UnsupportedError
from engine_plugins.weights.hardware import free_memory
from engine_plugins.weights.hardware.free_memory import surely_free_bytes
from engine_plugins.weights.receiving.staging import Mode, StagingRoom, choose_mode, newly_taken

GB = 10**9


def rooms(*wanted_gb: float, free_gb: float, held_gb: float = 0) -> list[StagingRoom]:
    """Ranks of one host."""
    return [
        StagingRoom(
            tp_rank=rank,
            wanted_bytes=int(gb * GB),
            held_bytes=int(held_gb * GB),
            free_bytes=int(free_gb * GB),
        )
        for rank, gb in enumerate(wanted_gb)
    ]


@pytest.mark.parametrize(
    ("asked", "bound", "staged", "reason"),
    [
        (rooms(1.2, free_gb=9), None, True, "1.2 GB of 9 GB free on the host"),
        (rooms(1, 1, free_gb=8), None, True, "2 GB of 8 GB free on the host"),
        (
            rooms(20, 20, free_gb=80),
            None,
            False,
            "staging wants 40 GB, a quarter of what is free on the host is 20 GB",
        ),
        (rooms(2, free_gb=6, held_gb=2), None, True, "2 GB of 8 GB free on the host"),
        (rooms(2, free_gb=6), None, False, "a quarter of what is free on the host is 1.5 GB"),
        (rooms(3, 3, free_gb=8), 6 * GB, True, "6 GB of 8 GB free on the host"),
        (rooms(3, 3, free_gb=8), 5 * GB, False, "ENGINE_PLUGINS_STAGING_BYTES is 5 GB"),
        (rooms(9, free_gb=8), 10 * GB, False, "wants 9 GB, what is free on the host is 8 GB"),
        (rooms(1, free_gb=8), 0, False, "ENGINE_PLUGINS_STAGING_BYTES is 0 MB"),
        (rooms(0, free_gb=8), None, False, "nothing is received"),
    ],
)
def test_auto_stages_what_fits(
    asked: list[StagingRoom], bound: int | None, staged: bool, reason: str
) -> None:
    """All ranks together, in a quarter of what is free or in the operator's own bound."""
    choice = choose_mode("auto", asked, bound)
    assert choice.staged == staged
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("bound", "others_gb", "staged"),
    [(None, 1, True), (None, 2, False), (6, 5, True), (6, 7, False)],
)
def test_what_other_servers_are_about_to_take_is_not_free(
    bound: int | None, others_gb: int, staged: bool
) -> None:
    """3 GB are wanted: of a quarter of 16 GB, or of a bound that may not pass what is left of 9."""
    free_gb = 16 if bound is None else 9
    choice = choose_mode(
        "auto", rooms(3, free_gb=free_gb), bound and bound * GB, others_bytes=others_gb * GB
    )
    assert choice.staged == staged
    assert ("of other servers" in choice.reason) == (not staged)


def test_what_ranks_hold_is_not_taken_again() -> None:
    """One has what it needs and more, the other nothing."""
    held, new = rooms(2, free_gb=9, held_gb=3)[0], rooms(2, free_gb=9)[0]
    assert newly_taken([held, new]) == 2 * GB


@pytest.mark.parametrize(("mode", "staged"), [("staged", True), ("in_place", False)])
def test_what_is_asked_for_is_done(mode: Mode, staged: bool) -> None:
    """Also where auto would choose otherwise."""
    assert choose_mode(mode, rooms(3, free_gb=4), 0) == (staged, "as asked")


def test_ranks_that_do_not_fit_together_are_not_staged_at_all() -> None:
    """Whoever asked for it: the kernel would end one of them."""
    with pytest.raises(UnsupportedError, match=r"5 GB .* 2 ranks together, and 4 GB are free"):
        choose_mode("staged", rooms(2.5, 2.5, free_gb=4), None)


def test_the_tightest_limit_says_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine, a cgroup and the process's addresses, each in turn the least."""
    figures = psutil.virtual_memory()._replace(available=300 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: figures)
    monkeypatch.setattr(free_memory, "tightest_cgroup", lambda: (None, 0))
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: unlimited)
    assert surely_free_bytes() == 300 * GB
    monkeypatch.setattr(free_memory, "tightest_cgroup", lambda: (250 * GB, 50 * GB))
    assert surely_free_bytes() == 200 * GB
    monkeypatch.setattr(free_memory, "resident_and_addresses", lambda: (1 * GB, 30 * GB))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (130 * GB, 130 * GB))
    assert surely_free_bytes() == 100 * GB
    monkeypatch.setattr(free_memory, "tightest_cgroup", lambda: (5 * GB, 6 * GB))
    assert surely_free_bytes() == 0
