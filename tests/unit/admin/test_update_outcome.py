"""What an update came to, in figures and in words."""

from __future__ import annotations

import time

import pytest

from engine_plugins.admin.schemas import UpdateBody
from engine_plugins.admin.state import EngineState
from engine_plugins.admin.update_outcome import half_way, lost_memory, report_of
from engine_plugins.admin.update_record import UpdateRecord
from engine_plugins.errors import PeerLostError
from engine_plugins.weights.contract.report import PlanSummary, RankReport


@pytest.fixture
def record() -> UpdateRecord:
    """An update that began a second ago and has paused the engine for half of it."""
    plan = PlanSummary(
        plan_id="p",
        direction="pull",
        bytes_needed=30,
        bytes_to_move=40,
        operations=2,
        direct_bytes=0,
        staged_bytes=0,
        loader_bytes=30,
        connect_s=0.25,
        plan_s=0.125,
        ranks=[],
    )
    now = time.monotonic()
    return UpdateRecord(
        asked=UpdateBody(plan_id="p", version=3, request_id="r").model_dump(),
        plan=plan,
        staged=False,
        mode_reason="as asked",
        before=EngineState(since=0.0),
        began=now - 1,
        deadline=now + 1,
        still_since=now - 0.5,
        paused_here=True,
        seconds={"pause_s": 0.5},
    )


def rank(tp_rank: int, *, wire_s: float, peak: int) -> RankReport:
    return RankReport(
        tp_rank=tp_rank,
        pid=1,
        bytes_moved=20,
        direct_bytes=4,
        staged_bytes=5,
        loader_bytes=6,
        wire_s=wire_s,
        install_s=wire_s / 2,
        peak_extra_bytes=peak,
    )


def test_bytes_add_up_and_seconds_are_the_slowest_ranks(record: UpdateRecord) -> None:
    """Over two ranks that worked at the same time."""
    ranks = [rank(0, wire_s=0.1, peak=7), rank(1, wire_s=0.2, peak=3)]
    report = report_of(record, "installed", ranks, paused_s=0.5)
    assert (report.bytes_moved, report.bytes_needed) == (40, 30)
    assert (report.direct_bytes, report.staged_bytes, report.loader_bytes) == (8, 10, 12)
    assert report.gbps == pytest.approx(40 / 1e9 / 0.2)
    assert (report.phases.pull_s, report.phases.install_s) == (0.2, 0.1)
    assert (report.phases.connect_s, report.phases.pause_s) == (0.25, 0.5)
    assert (report.peak_extra_bytes, report.paused_s, report.mode) == (7, 0.5, "in_place")
    assert report.seconds >= 1


def test_an_engine_that_stood_still_before_was_not_paused(record: UpdateRecord) -> None:
    """Its standstill is its caller's."""
    record.paused_here = False
    assert report_of(record, "prepared", paused_s=0.5).paused_s == 0


def test_a_fence_names_the_way_out() -> None:
    """An update of that version or a newer one; or, where bytes may still come in, a restart."""
    error = PeerLostError("trainer-0 is gone")
    mended, lost = half_way(3, error), lost_memory(3, error)
    assert (mended.code, mended.for_good, mended.attempted_version) == ("peer_lost", False, 3)
    assert "version 3 or send a newer one" in mended.remedy
    assert (lost.code, lost.for_good) == ("live_memory_lost", True)
    assert lost.remedy == "restart the engine"
    for fence in (mended, lost):
        assert "trainer-0 is gone" in fence.detail
