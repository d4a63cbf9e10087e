"""What an update under way remembers, as every process of the server finds it."""

from __future__ import annotations

import time
from pathlib import Path

from engine_plugins.admin.schemas import UpdateBody
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.update_record import UpdateRecord, UpdateRecords
from engine_plugins.weights.contract.report import Phases, PlanSummary, UpdateReport

PLAN = PlanSummary(
    plan_id="p",
    direction="pull",
    bytes_needed=8,
    bytes_to_move=8,
    operations=1,
    direct_bytes=0,
    staged_bytes=0,
    loader_bytes=8,
    connect_s=0.0,
    plan_s=0.0,
    ranks=[],
)
BODY = UpdateBody(plan_id="p", version=3, request_id="step 3/../\n", resume=False)


def record(shared: SharedState) -> UpdateRecord:
    now = time.monotonic()
    return UpdateRecord(
        asked=BODY.model_dump(),
        plan=PLAN,
        staged=True,
        mode_reason="as asked",
        before=shared.read(),
        began=now,
        deadline=now + 5,
        still_since=now,
    )


def prepared_report() -> UpdateReport:
    return UpdateReport(
        version=3,
        request_id=BODY.request_id,
        plan_id="p",
        outcome="prepared",
        mode="staged",
        bytes_moved=8,
        bytes_needed=8,
        gbps=0.0,
        seconds=0.1,
        paused_s=0.0,
        phases=Phases(),
        peak_extra_bytes=0,
        ranks=[],
        finished_at=0.0,
    )


def test_another_process_reads_what_was_kept(runtime_dir: Path) -> None:
    """Every field, the body as it was asked for, and nothing after it was dropped."""
    ours, theirs = SharedState(runtime_dir), SharedState(runtime_dir)
    assert UpdateRecords(theirs).read() is None
    kept = record(ours)
    kept.touched, kept.seconds = True, {"pause_s": 0.5}
    UpdateRecords(ours).keep(kept)
    found = UpdateRecords(theirs).read()
    assert found == kept
    assert found is not None
    assert found.body == BODY
    UpdateRecords(theirs).drop()
    assert UpdateRecords(ours).read() is None


def test_only_what_waits_for_its_commit_is_prepared(shared: SharedState) -> None:
    """An update that is carried on is not, nor is one of another request."""
    records, kept = UpdateRecords(shared), record(shared)
    records.keep(kept)
    assert records.prepared(BODY.request_id) is None
    kept.prepared = prepared_report()
    records.keep(kept)
    found = records.prepared(BODY.request_id)
    assert found is not None
    assert found.prepared == prepared_report()
    assert records.prepared("another") is None
