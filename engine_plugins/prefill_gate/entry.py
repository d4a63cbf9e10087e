"""The gate at the door: what an API process may refuse before an answer begins.

The gate itself sits with the engine's scheduler. It publishes limits, and whoever takes requests
compares: so a stream is refused by its status, not after a 200.
"""

from __future__ import annotations

import msgspec

from engine_plugins.errors import EnginePluginError, MemoryPressureError, PromptTooLargeError
from engine_plugins.prefill_gate.gate import MAX_WAIT_S, PrefillGate
from engine_plugins.prefill_gate.step_shape import Candidate

__all__ = ["EntryLimits", "entry_limits", "refusal_at_entry"]


class EntryLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler tells the API processes.

    Attributes:
        largest_prompt: tokens of the largest prompt that can ever run.
        largest_with_logprobs: the same of a prompt whose log-probabilities are asked for.
        waiting_s: seconds that the first in line has waited for memory.
        retry_after_s: when it is worth to try again.
    """

    largest_prompt: int
    largest_with_logprobs: int
    waiting_s: float = 0.0
    retry_after_s: int = 1


def entry_limits(
    gate: PrefillGate, *, max_prompt: int, divisible: bool, logprobs_held_bytes: int
) -> EntryLimits:
    """The limits as of now. Predicts a few dozen times: make it now and then, not at every step.

    Args:
        gate: of the scheduler.
        max_prompt: tokens that the engine accepts at all.
        divisible: whether it cuts prompts into chunks.
        logprobs_held_bytes: what prompt logprobs keep per token of the prompt.
    """
    plain = Candidate("", max_prompt, max_prompt, divisible=divisible)
    with_logprobs = plain._replace(prompt_logprobs=True, held_bytes_per_token=logprobs_held_bytes)
    return EntryLimits(
        largest_prompt=gate.largest_prompt(plain),
        largest_with_logprobs=gate.largest_prompt(with_logprobs),
        waiting_s=gate.longest_wait_s(),
        retry_after_s=gate.retry_after_s(),
    )


def refusal_at_entry(
    limits: EntryLimits, *, prompt_tokens: int, prompt_logprobs: bool
) -> EnginePluginError | None:
    """Why a request is refused before its answer begins; `None` lets it in."""
    largest = limits.largest_with_logprobs if prompt_logprobs else limits.largest_prompt
    if prompt_tokens > largest:
        kind = "a prompt with log-probabilities" if prompt_logprobs else "a prompt"
        return PromptTooLargeError(
            f"{kind} of {prompt_tokens} tokens can never run here: {largest} fit",
            remedy=f"send at most {largest} tokens",
            largest_prompt=largest,
        )
    if limits.waiting_s >= MAX_WAIT_S:
        return MemoryPressureError(
            f"requests have been waiting for memory for {limits.waiting_s:.0f} s",
            remedy=f"try again after {limits.retry_after_s} s",
            retry_after_s=limits.retry_after_s,
        )
    return None
