"""Plans and answers on the page: the newest ones, as many as fit, in every process."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from engine_plugins.admin import update_answers
from engine_plugins.admin.plans import MAX_PLANS, Plans
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.update_answers import StoredFailure, UpdateAnswers
from engine_plugins.errors import PeerLostError, UnknownIdError
from engine_plugins.weights.contract.report import (
    Phases,
    PlanSummary,
    RankPlan,
    RankReport,
    UpdateReport,
)


def plan(number: int, *, ranks: int = 1, reason: str = "why") -> PlanSummary:
    rank = RankPlan(
        tp_rank=0,
        bytes_needed=1,
        bytes_to_move=1,
        operations=1,
        direct_bytes=0,
        staged_bytes=1,
        loader_bytes=0,
        reasons=[reason] * 8,
        parameters_idle=[reason] * 8,
        steps=1,
        largest_step_bytes=1,
        arena_bytes=1,
    )
    return PlanSummary(
        plan_id=f"plan-{number}",
        direction="pull",
        bytes_needed=ranks,
        bytes_to_move=ranks,
        operations=1,
        direct_bytes=0,
        staged_bytes=0,
        loader_bytes=0,
        connect_s=1.0,
        plan_s=2.0,
        ranks=[msgspec.structs.replace(rank, tp_rank=n) for n in range(ranks)],
    )


def report(request_id: str, *, ranks: int = 1, error: str = "") -> UpdateReport:
    rank = RankReport(
        tp_rank=1 << 40, pid=1 << 40, bytes_moved=1 << 60, wire_s=0.1, install_s=0.1,
        peak_extra_bytes=1 << 60,
    )  # fmt: skip
    return UpdateReport(
        version=3,
        request_id=request_id,
        plan_id="p",
        outcome="failed" if error else "installed",
        mode="staged",
        bytes_moved=8,
        bytes_needed=8,
        gbps=0.0,
        seconds=0.1,
        paused_s=0.0,
        phases=Phases(),
        peak_extra_bytes=0,
        ranks=[rank] * ranks,
        finished_at=float(len(request_id)),
        error={"code": "c", "detail": error, "remedy": ""} if error else None,
    )


def test_the_newest_plans_are_kept(shared: SharedState) -> None:
    """Those that they displace are named; connecting counts for the first update alone."""
    ours, theirs = Plans(shared), Plans(SharedState(shared.runtime_dir))
    for number in range(MAX_PLANS):
        assert ours.add(plan(number)) == []
    assert theirs.add(plan(MAX_PLANS)) == ["plan-0"]
    assert [each.plan_id for each in ours.listed()] == [
        f"plan-{number}" for number in range(1, MAX_PLANS + 1)
    ]
    with pytest.raises(UnknownIdError, match="no plan 'plan-0' here"):
        ours.get("plan-0")
    assert theirs.get("plan-1").connect_s == 1.0
    ours.use("plan-1")
    assert (theirs.get("plan-1").connect_s, theirs.get("plan-1").plan_s) == (0.0, 0.0)
    assert theirs.get("plan-2").connect_s == 1.0


def test_plans_of_any_size_fit(shared: SharedState) -> None:
    """What a plan says of each rank is left out where it would not."""
    plans = Plans(shared)
    for number in range(2 * MAX_PLANS):
        plans.add(plan(number, ranks=8, reason="model.layers.7.mlp.gate_up_proj: fused"))
    assert [len(each.ranks) for each in plans.listed()] == [8] * MAX_PLANS
    plans.add(plan(99, ranks=4096, reason="x" * 1000))
    assert (plans.get("plan-99").ranks, plans.get("plan-99").bytes_needed) == ([], 4096)


def test_the_newest_answers_are_kept(shared: SharedState, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every process, one for each request."""
    monkeypatch.setattr(update_answers, "MOST", 3)
    ours, theirs = UpdateAnswers(shared), UpdateAnswers(SharedState(shared.runtime_dir))
    ours.keep(report("a", error="lost"), PeerLostError("lost", remedy="again"))
    for request_id in ("b", "c", "b"):
        theirs.keep(report(request_id))
    assert [each["request_id"] for each in ours.reports()] == ["b", "c", "a"]
    failed = theirs.of("a")
    assert failed is not None
    with pytest.raises(StoredFailure, match="lost") as raised:
        failed.report_or_raise()
    assert (raised.value.failed_with, raised.value.status) == ("peer_lost", 503)
    theirs.keep(report("d"))
    assert (ours.of("a"), ours.of("x")) == (None, None)
    found = ours.of("d")
    assert found is not None
    assert found.report_or_raise() == report("d")


@pytest.mark.parametrize(
    "make",
    [
        lambda name: report(name, ranks=64),
        lambda name: report(name, ranks=4096),
        lambda name: report(name, error="\N{SNOWMAN}" * 20_000),
        lambda name: report(name, error="\udc80" * 1000),
        lambda name: report("\N{SNOWMAN}" * 250 + name),
    ],
)
def test_answers_of_any_size_fit(shared: SharedState, make: Callable[[str], UpdateReport]) -> None:
    """Hundreds of them; the newest is whole where it was made."""
    ours, theirs = UpdateAnswers(shared), UpdateAnswers(SharedState(shared.runtime_dir))
    last = make("r")
    for number in range(300):
        last = make(f"r{number}")
        detail = (last.error or {}).get("detail", "")
        ours.keep(last, PeerLostError(detail) if detail else None)
    mine, other = ours.of(last.request_id), theirs.of(last.request_id)
    assert mine is not None
    assert other is not None
    assert mine.report == last
    assert other.report.outcome == last.outcome
    if other.failed is not None:
        assert "server's log" in other.failed.detail
    assert len(ours.reports()) > 10
