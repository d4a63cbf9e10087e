"""What an update came to: its report, or the fence that it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import msgspec

from engine_plugins.admin.state import Fence
from engine_plugins.admin.update_record import UpdateRecord
from engine_plugins.errors import (
    EngineDeadError,
    EnginePluginError,
    EngineStuckError,
    UpdateAbortedError,
)
from engine_plugins.weights.contract.report import Outcome, Phases, RankReport, UpdateReport
from engine_plugins.weights.receiving.worker_messages import StatusAnswer

__all__ = ["behind", "failure_report", "half_way", "lost_memory", "report_of", "stands_still"]

NAMED = 4
"""Of ranks that are equally far behind, so many are named."""


def report_of(
    record: UpdateRecord,
    outcome: Outcome,
    ranks: Sequence[RankReport] = (),
    *,
    paused_s: float = 0.0,
) -> UpdateReport:
    """The report of an update as its record has it now.

    Args:
        record: the update.
        outcome: what it came to.
        ranks: each rank's share, where it was installed.
        paused_s: wall seconds for which generation stood still, if it was paused here.
    """
    body, plan = record.body, record.plan
    moved_bytes = sum(rank.bytes_moved for rank in ranks)
    wire_s = max((rank.wire_s for rank in ranks), default=0.0)
    mode: Literal["staged", "in_place"] = "staged" if record.staged else "in_place"
    return UpdateReport(
        version=body.version,
        request_id=body.request_id,
        plan_id=plan.plan_id,
        outcome=outcome,
        mode=mode,
        mode_reason=record.mode_reason,
        bytes_moved=moved_bytes,
        bytes_needed=plan.bytes_needed,
        direct_bytes=sum(rank.direct_bytes for rank in ranks),
        staged_bytes=sum(rank.staged_bytes for rank in ranks),
        loader_bytes=sum(rank.loader_bytes for rank in ranks),
        gbps=moved_bytes / 1e9 / wire_s if wire_s > 0 else 0.0,
        seconds=time.monotonic() - record.began,
        paused_s=paused_s if record.paused_here else 0.0,
        phases=Phases(
            connect_s=plan.connect_s,
            plan_s=plan.plan_s,
            pull_s=wire_s,
            install_s=max((rank.install_s for rank in ranks), default=0.0),
            **record.seconds,
        ),
        peak_extra_bytes=max((rank.peak_extra_bytes for rank in ranks), default=0),
        ranks=list(ranks),
        finished_at=time.time(),
    )


def failure_report(record: UpdateRecord, error: EnginePluginError) -> UpdateReport:
    """The report of an update that failed, for the history."""
    return msgspec.structs.replace(
        report_of(record, "aborted" if isinstance(error, UpdateAbortedError) else "failed"),
        error={"code": error.code, "detail": error.message, "remedy": error.remedy},
    )


def half_way(version: int, error: EnginePluginError) -> Fence:
    """The fence of an update that failed after it had touched live weights."""
    return Fence(
        code=error.code,
        detail=f"the update to version {version} failed half way: {error.message}",
        remedy=f"repeat the update to version {version} or send a newer one, under a new "
        "request_id",
        attempted_version=version,
    )


def lost_memory(version: int, error: EnginePluginError) -> Fence:
    """The fence of one whose bytes may still come into live weights."""
    return Fence(
        code="live_memory_lost",
        detail=f"bytes of the update to version {version} may still land in live weights, "
        f"which no later update can mend: {error.message}",
        remedy="restart the engine",
        attempted_version=version,
        for_good=True,
    )


def stands_still(
    version: int,
    error: EnginePluginError,
    silent: EngineStuckError | EngineDeadError,
    *,
    touched: bool,
) -> Fence:
    """The fence of an engine that does not answer, in the middle of an update.

    Args:
        version: that of the update.
        error: why it was given up.
        silent: what was seen of the engine when it was told to give up.
        touched: whether live weights may have been written.
    """
    dead = isinstance(silent, EngineDeadError)
    how = "failed half way" if touched else "was given up"
    go_on = "let the process that stands still go on, or restart the engine; then "
    return Fence(
        code=silent.code,
        detail=f"the update to version {version} {how}: {error.message}",
        remedy="restart the engine"
        if dead
        else f"{go_on}repeat the update to version {version} or send a newer one, under a new "
        "request_id",
        attempted_version=version,
        for_good=dead,
    )


def behind(statuses: Sequence[StatusAnswer]) -> str:
    """The ranks that are furthest behind, and how far they came."""
    last = min((each.steps_installed, each.bytes_done) for each in statuses)
    ranks = [each for each in statuses if (each.steps_installed, each.bytes_done) == last]
    told = [
        f"rank {each.tp_rank} has {each.bytes_done} of {each.bytes_total} bytes and "
        f"{each.steps_installed} of {each.steps_total} modules installed"
        for each in ranks[:NAMED]
    ]
    more = f", and {len(ranks) - NAMED} more ranks" if len(ranks) > NAMED else ""
    return "; ".join(told) + more
