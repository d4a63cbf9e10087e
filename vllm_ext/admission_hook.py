"""What is refused by a status before anything of an answer is sent: at the door, or later.

A fenced engine takes no request; the prefill gate refuses what there is no memory for, at the door
or when its scheduler comes to it. Patches, idempotent. vLLM has no plugin point for admission;
remove when it has.
"""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncGenerator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from engine_plugins.admin.held_answer import HeldAnswer, held_answer, releasing
from engine_plugins.admin.runtime_dir import RUNTIME_DIR, shared_state
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import refusal
from engine_plugins.prefill_gate.entry import GateBoard, refusal_at_entry
from vllm_ext.held_stream import all_have_spoken, explained, marked_as_held
from vllm_ext.prefill_refusal import RefusedPrefillError, answer_to

__all__ = ["hook_admission"]

_HOOKED = "engine_plugins_hooked"


def hook_admission() -> None:
    """Wrap the admission check and the token stream of this API process."""
    if hasattr(AsyncLLM, _HOOKED):
        return
    shared = shared_state()
    board = GateBoard(Path(os.environ[RUNTIME_DIR]))
    _refuse_while_fenced(shared)
    _refuse_prefills(board, shared)
    _refuse_responses(board)
    setattr(AsyncLLM, _HOOKED, True)


def _refuse_while_fenced(shared: SharedState) -> None:
    original = AsyncLLM.check_admission

    @functools.wraps(original)
    def check_admission(self: AsyncLLM, *args: Any, **kwargs: Any) -> None:
        refused = refusal(shared.read())
        if refused is not None:
            raise GracefulHTTPError(refused, HTTPStatus.SERVICE_UNAVAILABLE)
        original(self, *args, **kwargs)

    AsyncLLM.check_admission = check_admission


def _refuse_prefills(board: GateBoard, shared: SharedState) -> None:
    """Refuse what cannot run when an answer is asked for, or else before it begins."""
    original = AsyncLLM.generate

    @functools.wraps(original)
    def generate(
        self: AsyncLLM, prompt: Any, sampling_params: SamplingParams, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        _judge(board, prompt, sampling_params)
        held = _open_answer()
        if held is None:
            outputs = original(self, prompt, sampling_params, *args, **kwargs)
            return explained(outputs, shared)
        outputs = original(self, prompt, marked_as_held(sampling_params), *args, **kwargs)
        return releasing(
            explained(outputs, shared, held), held.hold(), when=all_have_spoken(sampling_params.n)
        )

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
        held = _open_answer()
        return contexts if held is None else releasing(contexts, held.hold())

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
        error, held = RefusedPrefillError(refused), _open_answer()
        if held is not None:
            held.refuse(answer_to(error))
        raise error


def _open_answer() -> HeldAnswer | None:
    """The HTTP answer that a request is for, if a refusal would still come in time."""
    held = held_answer()
    return None if held is None or held.begun else held
