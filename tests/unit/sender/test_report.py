"""What a sender's report says to people."""

from __future__ import annotations

import msgspec
import pytest

from engine_plugins.sender.report import SenderReport
from engine_plugins.weights.contract.report import Phases, UpdateReport

URL = "http://engine:8000"


UPDATE = UpdateReport(
    version=3,
    request_id="a",
    plan_id="plan",
    outcome="installed",
    mode="in_place",
    bytes_moved=7_000_000,
    bytes_needed=7_000_000,
    gbps=1.0,
    seconds=0.5,
    paused_s=0.1,
    phases=Phases(),
    peak_extra_bytes=0,
    ranks=[],
    finished_at=0.0,
)


@pytest.mark.parametrize(
    ("ways", "said"),
    [
        ({"loader_bytes": 7_000_000}, "7.0 MB through the loader"),
        ({"direct_bytes": 7_000_000}, "7.0 MB direct"),
        ({"staged_bytes": 7_000_000}, "7.0 MB staged"),
        (
            {"direct_bytes": 5_000_000, "loader_bytes": 2_000_000},
            "5.0 MB direct, 2.0 MB through the loader",
        ),
    ],
)
def test_it_says_which_way_the_bytes_of_this_update_went(ways: dict[str, int], said: str) -> None:
    """Not which way they were to go when the plan was made."""
    update = msgspec.structs.replace(UPDATE, **ways)
    report = SenderReport.of(3, {URL: update}, {}, 1.0, fed_by={})
    assert str(report).endswith(f"paused 0.10 s, {said}")


@pytest.mark.parametrize(
    ("mode", "reason", "said"),
    [
        ("staged", "1.2 GB of 9 GB free on the host", "staged (1.2 GB of 9 GB free on the host)"),
        ("in_place", "as asked", "in place (as asked)"),
        ("in_place", "", "in place"),  # an older engine gives no reason
    ],
)
def test_it_says_which_mode_was_chosen_and_why(mode: str, reason: str, said: str) -> None:
    update = msgspec.structs.replace(UPDATE, mode=mode, mode_reason=reason)
    report = SenderReport.of(3, {URL: update}, {}, 1.0, fed_by={})
    assert f", {said}, paused" in str(report)


@pytest.mark.parametrize(
    ("wait_s", "said"), [(1.25, ", waited 1.25 s for another call, paused 0.10 s"), (0.01, None)]
)
def test_it_says_how_long_an_engine_was_busy(wait_s: float, said: str | None) -> None:
    update = msgspec.structs.replace(UPDATE, phases=Phases(wait_s=wait_s))
    told = str(SenderReport.of(3, {URL: update}, {}, 1.0, fed_by={}))
    assert said in told if said else "waited" not in told
