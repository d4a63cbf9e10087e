"""Answers to updates, kept for when their request_id comes again: to any API process."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from engine_plugins.admin.error_responses import status_of
from engine_plugins.admin.schemas import UpdateBody
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import short
from engine_plugins.errors import ConflictError, EnginePluginError
from engine_plugins.weights.contract.report import UpdateReport

__all__ = ["Answer", "StoredFailure", "UpdateAnswers", "refuse_other_update"]

MOST = 256
MOST_BYTES = 400 << 10
"""Answers kept, and their bytes on the page; the oldest are forgotten first."""
_MOST_BYTES_OF_ONE = 100 << 10
_MOST_LONG = 4
_MOST_RANKS = 256


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


class _Kept(msgspec.Struct, frozen=True, array_like=True):
    request_id: str
    answer: msgspec.Raw


_KEPT = msgspec.msgpack.Decoder(list[_Kept])


class UpdateAnswers:
    """What every update came to, report or failure, by its request_id."""

    def __init__(self, shared: SharedState) -> None:
        self._shared = shared
        self._long: dict[str, Answer] = {}
        """The newest answers whose texts were cut for the page: this process has them whole."""

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
        for each in self._newest_first():
            if each.request_id == request_id:
                answer = msgspec.msgpack.decode(each.answer, type=Answer)
                whole = self._long.get(request_id, answer)
                return whole if whole.report.finished_at == answer.report.finished_at else answer
        return None

    def keep(self, report: UpdateReport, error: EnginePluginError | None = None) -> None:
        """Remember what an update came to."""
        failed = None
        if error is not None:
            failed = _Failed(
                status=status_of(error), code=error.code, detail=error.message, remedy=error.remedy
            )
        answer = Answer(report=report, failed=failed)
        kept = _Kept(report.request_id, msgspec.Raw(self._for_the_page(answer)))

        def change(body: bytes) -> bytes:
            others = (each for each in _read(body) if each.request_id != kept.request_id)
            return msgspec.msgpack.encode(_newest([*others, kept]))

        self._shared.revise("answers", change)

    def reports(self) -> list[dict[str, object]]:
        """Every report that is kept, newest first."""
        answers = (msgspec.msgpack.decode(each.answer) for each in self._newest_first())
        return [answer["report"] for answer in answers]

    def _newest_first(self) -> Iterator[_Kept]:
        return reversed(_read(self._shared.kept("answers")))

    def _for_the_page(self, answer: Answer) -> bytes:
        """An answer's bytes; of one that is too long the texts are cut, and the ranks left out."""
        try:
            body = msgspec.msgpack.encode(answer)
        except UnicodeEncodeError:  # half a character, from a file's name, say
            body = b""
        if 0 < len(body) <= _MOST_BYTES_OF_ONE:
            return body
        self._long[answer.report.request_id] = answer
        for request_id in list(self._long)[:-_MOST_LONG]:
            del self._long[request_id]
        report, failed = answer.report, answer.failed
        error = {name: short(text) for name, text in (report.error or {}).items()} or None
        ranks = [] if len(report.ranks) > _MOST_RANKS else report.ranks
        report = msgspec.structs.replace(report, error=error, ranks=ranks)
        if failed is not None:
            failed = _Failed(
                status=failed.status,
                code=failed.code,
                detail=short(failed.detail),
                remedy=short(failed.remedy),
            )
        return msgspec.msgpack.encode(Answer(report=report, failed=failed))


def _read(body: bytes) -> list[_Kept]:
    return _KEPT.decode(body) if body else []


def _newest(kept: list[_Kept]) -> list[_Kept]:
    """The last ones, as many as fit."""
    size = 0
    for count, each in enumerate(reversed(kept)):
        size += len(bytes(each.answer)) + len(each.request_id.encode()) + 16
        if count == MOST or size > MOST_BYTES:
            return kept[-count:]
    return kept


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
