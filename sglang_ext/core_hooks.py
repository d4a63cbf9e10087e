"""What is added to SGLang's scheduler: KV kept apart by weights, flush and end at any time.

All ranks of an engine schedule alike, so nothing here may depend on a clock or on a file that
another rank could see changed a moment later: what a rank knows comes to it as a call, which
SGLang broadcasts in one order to all.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from sglang.srt.managers import mm_schedule
from sglang.srt.managers.io_struct import (
    AbortReq,
    ContinueGenerationReqInput,
    PauseGenerationReqInput,
)

from engine_plugins.admin.kv_mark import marked
from engine_plugins.errors import EngineCallError
from sglang_ext.health_probe import is_probe

__all__ = ["SchedulerHooks", "end_if_fenced", "fenced", "mark_from_the_start", "mark_new_request"]

_MARK = "engine_plugins_kv_mark"
_FENCE = "engine_plugins_fence"
"""Why requests were ended, until weights have come that may serve."""


def mark_new_request(scheduler: Any, request: Any, **kwargs: Any) -> None:
    """Before `Scheduler.handle_generate_request`: KV of other weights must not be found."""
    request.extra_key = marked(request.extra_key, getattr(scheduler, _MARK, None))


def end_if_fenced(result: None, scheduler: Any, request: Any, **kwargs: Any) -> None:
    """After a request has come to a scheduler: a fence that has ended all others ends it too.

    It was let in before the fence closed, and was being tokenized or on its way. All ranks are told
    of the fence as of requests, in one order, so all end the same ones.
    """
    reason = getattr(scheduler, _FENCE, None)
    if reason is not None and not is_probe(request, len(request.input_ids or ())):
        _end_all(scheduler, reason)


def mark_from_the_start(scheduler: Any, mark: str | None) -> None:
    """Give new requests this mark until an update brings another.

    All ranks are given the same: the page holds it before the first of them starts, and no update
    can come before the last one answers.
    """
    setattr(scheduler, _MARK, mark)


class SchedulerHooks:
    """Calls that concern one rank's scheduler rather than its weights."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    @property
    def calls(self) -> dict[str, Callable[..., Any]]:
        """By the name under which `SglangEngineControl` asks for them."""
        return {
            "scheduler_is_paused": self._is_paused,
            "scheduler_request_counts": self._request_counts,
            "scheduler_flush": self._flush,
            "scheduler_flush_multimodal": _flush_multimodal,
            "scheduler_isolate_kv": self._isolate_kv,
            "scheduler_fail_requests": self._fail_requests,
        }

    def _is_paused(self) -> bool:
        """Asked after a pause, which SGLang does not answer; the answer comes behind it."""
        return bool(self._scheduler._engine_paused)

    def _request_counts(self) -> list[int]:
        running = sum(not request.finished() for request in self._scheduler.collect_inflight_reqs())
        return [running, len(self._waiting())]

    def _flush(self) -> None:
        """Drop all KV; requests that hold some go back to the queue and will compute it anew.

        Raises:
            EngineCallError: SGLang would not flush.
        """
        scheduler = self._scheduler
        was_paused = scheduler._engine_paused
        scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
        # Requests whose grammar is still being compiled hold no KV, but count as pending.
        grammars = scheduler.grammar_manager
        compiling, grammars.grammar_queue = grammars.grammar_queue, []
        try:
            flushed = scheduler.flush_cache(empty_cache=False)
        finally:
            grammars.grammar_queue = compiling
            if not was_paused:
                scheduler.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
        if not flushed:
            raise EngineCallError("SGLang could not flush its cache", remedy="see the server's log")

    def _isolate_kv(self, mark: str | None) -> int:
        """Give new requests, and those that hold no KV, the mark of the new weights.

        Those that hold KV keep it, under the old mark. Says how many changed.
        """
        setattr(self._scheduler, _MARK, mark)
        setattr(self._scheduler, _FENCE, None)
        without_kv = [request for request in self._waiting() if not request.kv.holds_kv]
        for request in without_kv:
            request.extra_key = marked(request.extra_key, mark)
        return len(without_kv)

    def _fail_requests(self, reason: str) -> int:
        """End every request, and those that come until the weights are good; say how many."""
        setattr(self._scheduler, _FENCE, reason)
        return _end_all(self._scheduler, reason)

    def _waiting(self) -> list[Any]:
        return [*self._scheduler.waiting_queue, *self._scheduler.grammar_manager.grammar_queue]


def fenced(reason: str) -> dict[str, Any]:
    """Why a request of a fenced engine ends, as SGLang's API processes read it."""
    return {
        "type": "abort",
        "message": reason,
        "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
        "err_type": "ServiceUnavailableError",
    }


def _end_all(scheduler: Any, reason: str) -> int:
    """End every request, running or queued, with an error; say how many.

    Retracted first: SGLang ends a running request only by one more step of the model.
    """
    scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
    compiling = scheduler.grammar_manager.grammar_queue
    scheduler.waiting_queue.extend(compiling)
    compiling.clear()
    ended = len(scheduler.waiting_queue)
    why = fenced(reason)
    scheduler.abort_request(AbortReq(abort_all=True, finished_reason=why))
    return ended


def _flush_multimodal() -> None:
    """Drop what this rank's vision tower made of earlier images."""
    if mm_schedule.embedding_cache is not None:
        mm_schedule.embedding_cache.clear()
