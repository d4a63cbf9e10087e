"""What SGLang's requests and batches compute, in the gate's terms."""

from __future__ import annotations

from typing import Any

from engine_plugins.prefill_gate.step_shape import Candidate, StepShape
from sglang_ext.health_probe import is_probe

__all__ = ["HELD_BYTES_PER_LOGPROB", "PrefillShapes"]

HELD_BYTES_PER_LOGPROB = 64
"""Of a number and a token id as Python keeps them, with their places in lists."""


class PrefillShapes:
    """The shapes of one scheduler's steps.

    Args:
        one_by_one: whether attention gathers the context of one prefill after another, so that only
            the longest counts.
    """

    def __init__(self, *, one_by_one: bool) -> None:
        self._one_by_one = one_by_one

    def candidate(self, request: Any, limit: int | None, *, refusable: bool) -> Candidate:
        """The prefill that a request would begin or go on with.

        Args:
            request: SGLang's `Req`, matched against the prefix cache.
            limit: tokens that this step may still compute; `None` if prompts are not cut.
            refusable: see `Candidate`.
        """
        prompt, computed = len(request.full_untruncated_fill_ids), request.prefix_len
        missing = max(prompt - computed, 1)
        wanted = missing if limit is None else min(missing, limit)
        return Candidate(
            request.rid,
            wanted,
            prompt,
            computed,
            prompt_logprobs=_logprob_rows(request, computed, wanted) > 0,
            held_bytes_per_token=_held_per_token(request),
            multimodal_tokens=_multimodal_tokens(request, computed, wanted),
            lora=request.lora_id is not None,
            divisible=limit is not None,
            refusable=refusable,
            exempt=is_probe(request, prompt),
        )

    def largest(self, scheduler: Any) -> StepShape:
        """The most that a scheduler puts into a step, but for rows of logits."""
        context: int = scheduler.model_config.context_len
        requests: int = scheduler.max_running_requests
        tokens = scheduler.chunked_prefill_size
        if tokens is None:  # decodes may join the longest of prompts
            tokens = max(scheduler.max_prefill_tokens, context) + requests
        return StepShape(
            tokens=tokens,
            context=context if self._one_by_one else context * requests,
            pairs=tokens * context,
            lora_tokens=tokens,
        )

    def batch(self, batch: Any) -> StepShape:
        """A batch that is about to run."""
        requests = batch.reqs
        if not batch.forward_mode.is_extend():
            lora = sum(request.lora_id is not None for request in requests)
            return StepShape(tokens=len(requests), rows=len(requests), lora_tokens=lora)
        shapes = [
            _part(request, computed, tokens)
            for request, computed, tokens in zip(
                requests, batch.prefix_lens, batch.extend_lens, strict=True
            )
        ]
        total = StepShape(*(sum(column) for column in zip(*shapes, strict=True)))
        if self._one_by_one:
            return total._replace(context=max(shape.context for shape in shapes))
        return total


def _part(request: Any, computed: int, tokens: int) -> StepShape:
    context = computed + tokens
    return StepShape(
        tokens=tokens,
        context=context,
        pairs=tokens * context,
        rows=1,
        prompt_logprob_rows=_logprob_rows(request, computed, tokens),
        multimodal_tokens=_multimodal_tokens(request, computed, tokens),
        lora_tokens=tokens if request.lora_id is not None else 0,
        held_bytes=0 if computed else _held_per_token(request) * len(request.origin_input_ids),
    )


def _logprob_rows(request: Any, computed: int, tokens: int) -> int:
    """Prompt tokens among the next whose log-probabilities were asked for."""
    start: int = request.logprob_start_len
    if not request.return_logprob or start < 0:
        return 0
    return max(computed + tokens - max(start, computed), 0)


def _held_per_token(request: Any) -> int:
    if _logprob_rows(request, 0, len(request.origin_input_ids)) <= 1:
        return 0
    asked = request.logprob
    ids = len(asked.token_ids_logprob or ())
    return HELD_BYTES_PER_LOGPROB * (2 + int(asked.top_logprobs_num or 0) + ids)


def _multimodal_tokens(request: Any, computed: int, tokens: int) -> int:
    """Tokens of the images and sounds that begin within the next tokens."""
    inputs = request.multimodal_inputs
    if inputs is None:
        return 0
    offsets = (each for item in inputs.mm_items for each in item.offsets or ())
    return sum(end - start + 1 for start, end in offsets if computed <= start < computed + tokens)
