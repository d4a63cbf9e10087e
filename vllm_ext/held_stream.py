"""A stream whose HTTP answer is held until it speaks: until then the scheduler may refuse it.

The scheduler knows such a request by a mark that travels with its sampling parameters.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import AsyncGenerator, Callable
from typing import Any

from vllm.exceptions import GracefulHTTPError, RetryableRequestError
from vllm.sampling_params import SamplingParams

from engine_plugins.admin.held_answer import HeldAnswer
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import refusal
from vllm_ext.prefill_refusal import RefusedPrefillError, answer_to, refusal_of

__all__ = ["all_have_spoken", "explained", "is_marked_as_held", "marked_as_held"]

_CUT_SHORT = ("error", "abort")
"""How a fence ends requests: in the core, or where the core does not answer."""
_MARK = "engine_plugins_answer_is_held"


def marked_as_held(params: SamplingParams) -> SamplingParams:
    """The parameters of a request whose answer is held; a route may use its own again."""
    marked = copy.copy(params)
    marked.extra_args = {**(params.extra_args or {}), _MARK: True}
    return marked


def is_marked_as_held(params: SamplingParams) -> bool:
    """Whether the answer to a request was held when it came."""
    return bool(params.extra_args) and _MARK in params.extra_args


def all_have_spoken(sequences: int) -> Callable[[Any], bool]:
    """Whether each sequence of a request has had a token or ended, asked output by output.

    One whose prompt still waits may be refused, after others of the same answer have spoken.
    """
    silent = set(range(sequences))

    def spoken(output: Any) -> bool:
        silent.difference_update(
            each.index for each in output.outputs if each.token_ids or each.finish_reason
        )
        return not silent

    return spoken


async def explained(
    outputs: AsyncGenerator[Any, None], shared: SharedState, held: HeldAnswer | None = None
) -> AsyncGenerator[Any, None]:
    """The same outputs; a request that fence or gate ended says so, if its answer has not begun.

    Args:
        outputs: of a request.
        shared: tells whether the engine is fenced.
        held: the answer; without one, an answer begins with the first token.

    Raises:
        RefusedPrefillError: the gate's refusal.
        RetryableRequestError: the engine is fenced.
    """
    sent = False
    try:
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                ended = [each for each in output.outputs if each.finish_reason in _CUT_SHORT]
                if ended and not (sent if held is None else held.begun):
                    _explain(shared, ended[0].stop_reason)
                sent = sent or any(each.token_ids for each in output.outputs)
                yield output
    except (GracefulHTTPError, RetryableRequestError) as error:
        if held is not None:
            held.refuse(answer_to(error))
        raise


def _explain(shared: SharedState, stop_reason: object) -> None:
    refused_prefill = refusal_of(stop_reason)
    if refused_prefill is not None:
        raise RefusedPrefillError(refused_prefill)
    refused = refusal(shared.read())
    if refused is not None:
        raise RetryableRequestError(refused)
