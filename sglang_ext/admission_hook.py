"""What an API process refuses before any stream opens: all while fenced, and what cannot be held.

SGLang holds new requests of a paused engine in its API process; they never reached a scheduler
that could end them. How long a prompt is, is known when it has been tokenized.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from starlette.responses import Response

from engine_plugins.admin.error_responses import problem, problem_from
from engine_plugins.admin.held_answer import held_answer, releasing
from engine_plugins.admin.runtime_dir import shared_state
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import EngineState, refusal
from engine_plugins.errors import EnginePluginError
from engine_plugins.prefill_gate.entry import EntryLimits, GateBoard, refusal_at_entry
from sglang_ext.health_probe import bears_its_name, comes_from_its_route, is_probe
from sglang_ext.refused_prefill import refusal_in

__all__ = [
    "abort_reason",
    "answer_turns",
    "generate_request",
    "send_batch",
    "send_one",
]

LOOK_AGAIN_S = 0.25
"""How often a request of a paused engine looks whether the engine has been fenced."""
HOLDING_POLL_S = 0.02

_SHOWN = "engine_plugins_version"
_RESERVED = (
    f"a request id may not begin with {HEALTH_CHECK_RID_PREFIX}: SGLang drops such requests while "
    "it is busy; send another rid, or none"
)
_shared = functools.cache(shared_state)
_board = functools.cache(lambda: GateBoard(_shared().runtime_dir))


async def generate_request(
    original: Any, manager: Any, obj: Any, request: Any = None, *args: Any, **kwargs: Any
) -> AsyncGenerator[Any, None]:
    """Around `TokenizerManager.generate_request`, through which every route generates.

    Raises:
        HTTPException: 400 for a request that bears the name of SGLang's probe; 503 when the engine
            is fenced or is being fenced meanwhile.
        _StreamRefusedError: the same, for a request whose answer may have begun.
    """
    probe = comes_from_its_route(request)
    if bears_its_name(obj) and not probe:
        raise _refused_unread(problem(400, "reserved_request_id", _RESERVED), _RESERVED, obj)
    await _admitted(manager, _shared(), obj, probe=probe)
    outputs = original(manager, obj, request, *args, **kwargs)
    held = held_answer()
    if held is not None and getattr(obj, "stream", False):
        outputs = releasing(outputs, held.hold(), when=_all_have_spoken(obj))
    async with aclosing(outputs):
        async for output in outputs:
            yield output
            if held is not None and held.refusal is not None:
                return  # its other prompts end with it


def answer_turns(
    original: Any, serving: Any, *args: Any, **kwargs: Any
) -> AsyncGenerator[Any, None]:
    """Around `OpenAIServingResponses._generate_with_builtin_tools`.

    That route has told of itself when it asks for the first token.
    """
    contexts: AsyncGenerator[Any, None] = original(serving, *args, **kwargs)
    held = held_answer()
    return contexts if held is None else releasing(contexts, held.hold())


def _all_have_spoken(request: Any) -> Callable[[dict[str, Any]], bool]:
    """Whether each prompt and sequence of a stream has had an output, asked output by output."""
    spoken: set[int] = set()

    def all_have_spoken(output: dict[str, Any]) -> bool:
        spoken.add(output.get("index", 0))
        return len(spoken) >= int(request.batch_size * request.parallel_sample_num)

    return all_have_spoken


async def _admitted(manager: Any, shared: SharedState, obj: Any, *, probe: bool) -> None:
    """Wait as long as SGLang is paused, or drains before it pauses.

    SGLang's probe waits out a fence too: nobody listens for an error of it.
    """
    while True:
        state = shared.read()
        why = refusal(state)
        if why is not None and not probe:
            remedy = "" if state.fence is None else state.fence.remedy
            answer = problem(503, "fenced", why, remedy=remedy, state="fenced")
            raise _refused_unread(answer, why, obj)
        if state.holding is not None and state.holding.drains:
            await asyncio.sleep(HOLDING_POLL_S)
        elif manager.is_pause:
            await _resumed(manager)
        else:
            _show_version(manager, state)
            return


async def send_one(original: Any, manager: Any, tokenized: Any, *args: Any, **kwargs: Any) -> None:
    """Around `TokenizerManager._send_one_request`."""
    await send_batch(functools.partial(_only, original), manager, [tokenized], *args, **kwargs)


async def _only(
    original: Any, manager: Any, tokenized: list[Any], *args: Any, **kwargs: Any
) -> None:
    await original(manager, tokenized[0], *args, **kwargs)


async def send_batch(
    original: Any, manager: Any, tokenized: list[Any], *args: Any, **kwargs: Any
) -> None:
    """Around `TokenizerManager._send_batch_request`: what the gate has no room for stays here.

    Raises:
        HTTPException: 413 or 503.
        _StreamRefusedError: the same, for a request whose answer may have begun.
    """
    status = _board().read()
    if status is not None and status.limits.enforced:
        for each in tokenized:
            refusal = _refusal(status.limits, each)
            if refusal is not None:
                raise _refused_with(problem_from(refusal, state=None), str(refusal), each)
    await original(manager, tokenized, *args, **kwargs)


async def abort_reason(
    original: Any, manager: Any, out: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Around `TokenizerManager._handle_abort_finish_reason`: the scheduler's refusals."""
    refusal = refusal_in(out["meta_info"]["finish_reason"])
    held = held_answer()
    if refusal is not None and held is not None:
        held.refuse(problem_from(refusal, state=None))
    return await original(manager, out, *args, **kwargs)


def _refusal(limits: EntryLimits, tokenized: Any) -> EnginePluginError | None:
    prompt = len(tokenized.input_ids or ())
    if is_probe(tokenized, prompt):
        return None
    logprobs = getattr(tokenized, "return_logprob", False) and (
        0 <= tokenized.logprob_start_len < prompt - 1
    )
    return refusal_at_entry(limits, prompt_tokens=prompt, prompt_logprobs=logprobs)


class _StreamRefusedError(ValueError):
    """What SGLang's streams turn into a last event, with this status in it."""

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.status_code = HTTPStatus(status)


def _refused_unread(answer: Response, why: str, obj: Any) -> Exception:
    if getattr(obj, "stream", False):
        # SGLang does it first of all; what runs after a stream asks for the outcome.
        obj.normalize_batch_and_arguments()
    return _refused_with(answer, why, obj)


def _refused_with(answer: Response, why: str, request: Any) -> Exception:
    held = held_answer()
    if held is not None:
        held.refuse(answer)
    if getattr(request, "stream", False):
        return _StreamRefusedError(why, answer.status_code)
    return HTTPException(answer.status_code, why)


async def _resumed(manager: Any) -> None:
    """Wait for SGLang's own signal, but not for long: a fence gives none."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LOOK_AGAIN_S), manager.is_pause_cond:
            await manager.is_pause_cond.wait_for(lambda: not manager.is_pause)


def _show_version(manager: Any, state: EngineState) -> None:
    """Label this API process's answers, where another one has published a new version."""
    version = state.weights.version
    if version is not None and getattr(manager, _SHOWN, None) != version:
        manager._update_weight_version_if_provided(str(version))
        setattr(manager, _SHOWN, version)
