"""What became of an update whose answer did not come from the engine.

The engine goes on without its caller, and reads memory that the trainer would write next. A
gateway's 504, a reset or half an answer says nothing of it, so the engine is asked for as long as
it may take. What cannot be learnt is an error of its own, upon which the memory is taken back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from engine_plugins.admin_answers import EngineState, UpdateRequest
from engine_plugins.admin_client import AdminClient
from engine_plugins.errors import (
    AdminAnswerError,
    EnginePluginError,
    EngineUnreachableError,
    UpdateEndUnknownError,
)
from engine_plugins.weights.contract.report import UpdateReport

__all__ = ["answer_or_end"]

logger = logging.getLogger(__name__)

GRACE_S = 3.5
"""How long after the deadline of an update it is still asked about. Engines bound what they do by
that deadline, and a trainer is to be told soon after it: the memory is taken back then."""
POLL_S = 0.2
UNSEEN_S = 5.0
"""An engine that answers, and has shown nothing of the update for so long, has not begun it. A
request that reaches it later is refused, because the memory is taken back."""
LOOK_S = 5.0
"""For one question, and less near the end: a process that is stopped takes it and never answers."""
LEAST_LOOK_S = 0.5
GONE_S = 3.0
"""A server that nobody listens for so long has ended; nobody is left to be asked."""

Ask = Callable[[UpdateRequest], UpdateReport]


def answer_or_end(client: AdminClient, request: UpdateRequest, ask: Ask) -> UpdateReport:
    """Ask an engine for a step of an update, and go on until the engine itself has answered.

    Args:
        client: of the engine.
        request: the update; `timeout_s` of it bounds the wait.
        ask: the call; an engine answers it again as it did before.

    Raises:
        EnginePluginError: the engine's own refusal or failure, or nothing was sent.
        UpdateEndUnknownError: what became of the update cannot be found out.
    """
    give_up = time.monotonic() + request.timeout_s + GRACE_S
    try:
        return _checked(client, ask(request), request)
    except EnginePluginError as error:
        if _nothing_is_left_open(error):
            raise
        logger.warning("%s; asking the engine what became of %s", error, request.request_id)
        return _Inquiry(client, request, ask, error, give_up).end()


class _Inquiry:
    """Asks an engine about one update until its end is known."""

    def __init__(
        self,
        client: AdminClient,
        request: UpdateRequest,
        ask: Ask,
        cause: EnginePluginError,
        give_up: float,
    ) -> None:
        self._client = client
        self._request = request
        self._ask = ask
        self._cause = cause
        self._give_up = give_up
        self._unseen_since: float | None = None
        self._gone_since: float | None = None

    def end(self) -> UpdateReport:
        """The report of the update, or of its step.

        Raises:
            EnginePluginError: as `answer_or_end`.
        """
        while time.monotonic() < self._give_up:
            try:
                report = self._look()
            except EnginePluginError as error:
                if error is self._cause:
                    raise
                if self._is_gone(error):
                    break
            else:
                if report is not None:
                    return report
                if _for(self._unseen_since) >= UNSEEN_S:
                    break
            time.sleep(POLL_S)
        raise self._unknown() from self._cause

    def _look(self) -> UpdateReport | None:
        """The report, if there is one by now; what is seen of the update is noted."""
        left = self._give_up - time.monotonic()
        client = self._client.hurried(min(max(left, LEAST_LOOK_S), LOOK_S))
        history = client.weights().history
        ours = [report for report in history if report.request_id == self._request.request_id]
        if ours:
            return ours[0]
        state = client.state()
        self._gone_since = None
        if _is_under_way(state, self._request):
            self._unseen_since = None
            prepared = state.update is not None and state.update.phase == "prepared"
            return self._asked_again() if prepared else None
        if isinstance(self._cause, AdminAnswerError) and self._cause.by_engine:
            raise self._cause  # it had refused us for somebody else's update
        self._unseen_since = self._unseen_since or time.monotonic()
        return None

    def _asked_again(self) -> UpdateReport | None:
        """Of two phases: the answer is given again, and a commit that did not arrive is sent."""
        try:
            return _checked(self._client, self._ask(self._request), self._request)
        except EnginePluginError as error:
            if _nothing_is_left_open(error) and isinstance(error, AdminAnswerError):
                self._cause = error
            raise

    def _is_gone(self, error: EnginePluginError) -> bool:
        """Whether nobody has listened for long enough."""
        self._unseen_since = None
        if not (isinstance(error, EngineUnreachableError) and error.nobody_listens):
            self._gone_since = None
            return False
        self._gone_since = self._gone_since or time.monotonic()
        return _for(self._gone_since) >= GONE_S

    def _unknown(self) -> UpdateEndUnknownError:
        return UpdateEndUnknownError(
            f"what became of the update to version {self._request.version} cannot be found out "
            f"(request {self._request.request_id}; {self._cause.message}). The trainer's memory "
            "was taken back: an engine that still reads it refuses what it has read",
            remedy="look at the engine and at what stands before it; GET /admin/v1/weights says "
            "what it holds. Then update again",
        )


def _nothing_is_left_open(error: EnginePluginError) -> bool:
    """Whether an error says for certain that our update is not under way."""
    if isinstance(error, AdminAnswerError):
        # A request that came twice is refused for the update that it has begun itself.
        return error.by_engine and error.state != "updating"
    if isinstance(error, EngineUnreachableError):
        return error.nobody_listens
    return True  # nothing was sent: no token, say


def _checked(client: AdminClient, report: UpdateReport, request: UpdateRequest) -> UpdateReport:
    """A report, if it is of this request: something on the way may keep answers."""
    if report.request_id == request.request_id:
        return report
    raise AdminAnswerError(
        url=client.url,
        status=200,
        code="unreadable_answer",
        state="",
        detail=f"the answer speaks of request {report.request_id}, not {request.request_id}",
        remedy="look for a proxy that keeps answers",
        by_engine=False,
    )


def _is_under_way(state: EngineState, request: UpdateRequest) -> bool:
    if state.state != "updating":
        return False
    return state.update is None or state.update.request_id in ("", request.request_id)


def _for(since: float | None) -> float:
    return 0.0 if since is None else time.monotonic() - since
