"""What is refused at the door, by a status and before any stream opens, and what is ended later.

A fenced engine takes no request; the prefill gate refuses what there is no memory for. Patches,
idempotent. vLLM has no plugin point for admission; remove when it has.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import AsyncGenerator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.exceptions import GracefulHTTPError, RetryableRequestError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from engine_plugins.admin.runtime_dir import RUNTIME_DIR, shared_state
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import refusal
from engine_plugins.prefill_gate.entry import GateBoard, refusal_at_entry
from vllm_ext.prefill_refusal import RefusedPrefillError, refusal_of
from vllm_ext.versions import VLLM

__all__ = ["hook_admission"]

_HOOKED = "engine_plugins_hooked"


def hook_admission() -> None:
    """Wrap the admission check and the token stream of this API process."""
    if hasattr(AsyncLLM, _HOOKED):
        return
    VLLM.check("vllm.v1.engine.async_llm", "vllm.entrypoints.openai.responses.serving")
    shared = shared_state()
    _refuse_while_fenced(shared)
    _explain_ended_requests(shared)
    board = GateBoard(Path(os.environ[RUNTIME_DIR]))
    _refuse_prefills(board)
    _refuse_responses(board)
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


def _refuse_prefills(board: GateBoard) -> None:
    """Refuse what cannot run when an answer is asked for, before any stream opens."""
    original = AsyncLLM.generate

    @functools.wraps(original)
    def generate(
        self: AsyncLLM, prompt: Any, sampling_params: SamplingParams, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        _judge(board, prompt, sampling_params)
        outputs: AsyncGenerator[Any, None] = original(
            self, prompt, sampling_params, *args, **kwargs
        )
        return outputs

    AsyncLLM.generate = generate


def _refuse_responses(board: GateBoard) -> None:
    """The same where the Responses route asks for an answer only once its stream is open."""
    original = OpenAIServingResponses._generate_with_builtin_tools

    @functools.wraps(original)
    def generate(
        self: OpenAIServingResponses,
        request_id: str,
        engine_input: Any,
        sampling_params: SamplingParams,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[Any, None]:
        _judge(board, engine_input, sampling_params)
        contexts: AsyncGenerator[Any, None] = original(
            self, request_id, engine_input, sampling_params, *args, **kwargs
        )
        return contexts

    OpenAIServingResponses._generate_with_builtin_tools = generate


def _judge(board: GateBoard, prompt: Any, sampling_params: SamplingParams) -> None:
    status = board.read()
    token_ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
    if status is None or token_ids is None:
        return
    refused = refusal_at_entry(
        status.limits,
        prompt_tokens=len(token_ids),
        prompt_logprobs=sampling_params.prompt_logprobs is not None,
    )
    if refused is not None:
        raise RefusedPrefillError(refused)


def _explain_ended_requests(shared: SharedState) -> None:
    """A held request that the fence or the gate ended says so, if it had sent no token yet."""
    original = AsyncLLM.generate

    @functools.wraps(original)
    async def generate(self: AsyncLLM, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        sent = False
        async with contextlib.aclosing(original(self, *args, **kwargs)) as outputs:
            async for output in outputs:
                ended = [each for each in output.outputs if each.finish_reason == "error"]
                if ended and not sent:
                    _explain(shared, ended[0].stop_reason)
                sent = sent or any(each.token_ids for each in output.outputs)
                yield output

    AsyncLLM.generate = generate


def _explain(shared: SharedState, stop_reason: object) -> None:
    refused_prefill = refusal_of(stop_reason)
    if refused_prefill is not None:
        raise RefusedPrefillError(refused_prefill)
    refused = refusal(shared.read())
    if refused is not None:
        raise RetryableRequestError(refused)
