"""A refusal keeps its figures on its way through SGLang's own abort."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from sglang.srt.managers.io_struct import AbortReq

from engine_plugins.admin.error_responses import problem_from
from engine_plugins.errors import MemoryPressureError, PromptTooLargeError
from sglang_ext.refused_prefill import RefusedPrefill, refusal_in

TOO_LARGE = PromptTooLargeError("no; never", remedy="send at most 7 tokens", largest_prompt=7)
PRESSURE = MemoryPressureError("not now", remedy="try again after 5 s", retry_after_s=5)


def sent(reason: RefusedPrefill) -> dict[str, Any]:
    """As the API process receives it."""
    message = msgspec.msgpack.encode(AbortReq(rid="1", finished_reason=reason.to_json()))
    finished: dict[str, Any] = msgspec.msgpack.decode(message, type=AbortReq).finished_reason
    return finished


def test_for_good() -> None:
    reason = sent(RefusedPrefill(TOO_LARGE))
    assert reason["type"] == "abort"
    assert reason["status_code"] == 413
    refusal = refusal_in(reason)
    assert isinstance(refusal, PromptTooLargeError)
    assert (refusal.message, refusal.remedy) == ("no; never", "send at most 7 tokens")
    answer = problem_from(refusal, state=None)
    assert answer.status_code == 413
    assert json.loads(bytes(answer.body))["largest_prompt"] == 7


def test_for_now() -> None:
    refusal = refusal_in(sent(RefusedPrefill(PRESSURE)))
    assert isinstance(refusal, MemoryPressureError)
    answer = problem_from(refusal, state=None)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"


def test_sglangs_own_aborts_are_none_of_ours() -> None:
    own = {"type": "abort", "message": "Abort in waiting queue; sorry", "status_code": 503}
    assert refusal_in(own) is None
