"""What an update remembers while it is under way, on the page that every API process sees.

Prepare and commit may land on different processes, and the process that carries an update may die.
"""

from __future__ import annotations

from typing import Any

import msgspec

from engine_plugins.admin.schemas import UpdateBody
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import EngineState
from engine_plugins.weights.contract.report import PlanSummary, UpdateReport
from engine_plugins.weights.transport.transfers import DRAIN_S

__all__ = ["UpdateRecord", "UpdateRecords"]

WRITES_END_S = DRAIN_S + 3.0


class UpdateRecord(msgspec.Struct, kw_only=True):
    """One update under way. Times are of the host's monotonic clock, in seconds."""

    asked: dict[str, Any]
    """The fields of the `UpdateBody`."""
    plan: PlanSummary
    """Its totals; what it says of each rank is not kept."""
    staged: bool
    mode_reason: str
    """Why it is staged, or is not."""
    before: EngineState
    began: float
    deadline: float
    still_since: float
    """When generation last stopped; the update's begin where it stood still before."""
    paused_here: bool = False
    touched: bool = False
    """Whether a live weight may have been written: from here on only completion may serve."""
    seconds: dict[str, float] = {}
    prepared: UpdateReport | None = None
    """The answer to prepare, while the update waits for its commit."""

    @property
    def overdue_at(self) -> float:
        """When a commit that has not come will not come any more.

        Of a push somewhat after the deadline: the trainer ends its writes then, and says so.
        """
        return self.deadline + (WRITES_END_S if self.plan.direction == "push" else 0.0)

    @property
    def body(self) -> UpdateBody:
        """What was asked."""
        return UpdateBody.model_validate(self.asked)


class UpdateRecords:
    """The record of the engine's one update under way."""

    def __init__(self, shared: SharedState) -> None:
        self._shared = shared

    def read(self) -> UpdateRecord | None:
        """The update under way, or None."""
        kept = self._shared.kept("record")
        return msgspec.msgpack.decode(kept, type=UpdateRecord) if kept else None

    def prepared(self, request_id: str) -> UpdateRecord | None:
        """The update of this request, if it is prepared and waits."""
        record = self.read()
        if record is None or record.prepared is None:
            return None
        return record if record.body.request_id == request_id else None

    def keep(self, record: UpdateRecord) -> None:
        """Write it down, before what it says is done."""
        plan = msgspec.structs.replace(record.plan, ranks=[], destinations=[])
        kept = msgspec.msgpack.encode(msgspec.structs.replace(record, plan=plan))
        self._shared.revise("record", lambda _: kept)

    def drop(self) -> None:
        """The update has ended."""
        self._shared.revise("record", lambda _: b"")
