"""A fenced engine takes no request: 503 before any stream opens, and for those it held.

Patches of `AsyncLLM`, idempotent. vLLM has no plugin point for admission; remove when it has.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError, RetryableRequestError
from vllm.v1.engine.async_llm import AsyncLLM

from engine_plugins.admin.runtime_dir import shared_state
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import refusal
from vllm_ext.versions import VLLM

__all__ = ["hook_admission"]

_HOOKED = "engine_plugins_hooked"


def hook_admission() -> None:
    """Wrap the admission check and the token stream of this API process."""
    if hasattr(AsyncLLM, _HOOKED):
        return
    VLLM.check("vllm.v1.engine.async_llm")
    shared = shared_state()
    _refuse_while_fenced(shared)
    _explain_ended_requests(shared)
    setattr(AsyncLLM, _HOOKED, True)


def _refuse_while_fenced(shared: SharedState) -> None:
    original = AsyncLLM.check_admission

    @functools.wraps(original)
    def check_admission(self: AsyncLLM, n: int = 1, request_id: str | None = None) -> None:
        refused = refusal(shared.read())
        if refused is not None:
            raise GracefulHTTPError(refused, HTTPStatus.SERVICE_UNAVAILABLE)
        original(self, n, request_id)

    AsyncLLM.check_admission = check_admission


def _explain_ended_requests(shared: SharedState) -> None:
    """A held request that the fence ended answers 503 if it had sent no token yet."""
    original = AsyncLLM.generate

    @functools.wraps(original)
    async def generate(self: AsyncLLM, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        sent = False
        async for output in original(self, *args, **kwargs):
            ended = any(each.finish_reason == "error" for each in output.outputs)
            refused = refusal(shared.read()) if ended and not sent else None
            if refused is not None:
                raise RetryableRequestError(refused)
            sent = sent or any(each.token_ids for each in output.outputs)
            yield output

    AsyncLLM.generate = generate
