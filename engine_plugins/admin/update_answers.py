"""Answers to updates, kept for when their request_id comes again: to any API process."""

from __future__ import annotations

import hashlib

import msgspec

from engine_plugins.admin.error_responses import status_of
from engine_plugins.admin.schemas import UpdateBody
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.errors import ConflictError, EnginePluginError
from engine_plugins.weights.report import UpdateReport

__all__ = ["Answer", "StoredFailure", "UpdateAnswers", "refuse_other_update"]

MOST = 256
"""Answers kept; the oldest are forgotten first."""
_FOLDER = "answers"


class StoredFailure(EnginePluginError):
    """An update that failed before, answered again because its request_id came again."""

    def __init__(self, *, status: int, code: str, detail: str, remedy: str) -> None:
        super().__init__(detail, remedy=remedy)
        self.status = status
        self.failed_with = code


class _Failed(msgspec.Struct, frozen=True, kw_only=True):
    status: int
    code: str
    detail: str
    remedy: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What an update came to."""

    report: UpdateReport
    failed: _Failed | None = None

    def report_or_raise(self) -> UpdateReport:
        """The report of an update that installed its version.

        Raises:
            StoredFailure: it failed, or was aborted.
        """
        if self.failed is not None:
            raise StoredFailure(**msgspec.structs.asdict(self.failed))
        return self.report


class UpdateAnswers:
    """What every update came to, report or failure, by its request_id."""

    def __init__(self, shared: SharedState) -> None:
        self._shared = shared

    def again(self, body: UpdateBody) -> UpdateReport | None:
        """The answer that this request was given before; None for a new one.

        Raises:
            StoredFailure: it failed before.
            ConflictError: its request_id named another update.
        """
        answer = self.of(body.request_id)
        if answer is None:
            return None
        refuse_other_update(answer.report, body)
        return answer.report_or_raise()

    def of(self, request_id: str) -> Answer | None:
        """What an update came to; None for one that has not ended, or never was."""
        kept = self._shared.get(_FOLDER, _key(request_id))
        return None if kept is None else msgspec.json.decode(kept, type=Answer)

    def keep(self, report: UpdateReport, error: EnginePluginError | None = None) -> None:
        """Remember what an update came to."""
        failed = None
        if error is not None:
            failed = _Failed(
                status=status_of(error), code=error.code, detail=error.message, remedy=error.remedy
            )
        answer = Answer(report=report, failed=failed)
        self._shared.put(_FOLDER, _key(report.request_id), msgspec.json.encode(answer))
        for old in self._shared.names(_FOLDER)[:-MOST]:
            self._shared.drop(_FOLDER, old)

    def reports(self) -> list[dict[str, object]]:
        """Every report that is kept, newest first."""
        kept = (self._shared.get(_FOLDER, name) for name in self._shared.names(_FOLDER))
        answers = [msgspec.json.decode(answer) for answer in kept if answer is not None]
        return [answer["report"] for answer in reversed(answers)]


def refuse_other_update(given: UpdateReport, body: UpdateBody) -> None:
    """Refuse a request_id that named another update before.

    Raises:
        ConflictError: another version, or from another plan.
    """
    if (given.version, given.plan_id) != (body.version, body.plan_id):
        raise ConflictError(
            f"request_id {body.request_id!r} named the update to version {given.version} "
            f"from {given.plan_id} before",
            remedy="give every update a request_id of its own",
        )


def _key(request_id: str) -> str:
    """A file's name, whatever characters a caller puts in its request_id."""
    return hashlib.sha256(request_id.encode()).hexdigest()[:32]
