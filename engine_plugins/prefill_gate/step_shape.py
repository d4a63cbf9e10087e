"""What a step of an engine computes, as far as its memory depends on it."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NOTHING", "Candidate", "StepShape"]


class StepShape(NamedTuple):
    """One forward of all its requests together. Every field grows with what is added to a step.

    Attributes:
        tokens: that go through the layers, decoded ones included.
        context: tokens that the prefills among them attend to, each request's own included.
        pairs: query tokens times context tokens, summed over prefills.
        rows: of logits that are sampled from.
        prompt_logprob_rows: of logits of prompt tokens.
        multimodal_tokens: that go through an encoder first.
        lora_tokens: that go through an adapter.
        held_bytes: what the step allocates and keeps beyond its end.
    """

    tokens: int = 0
    context: int = 0
    pairs: int = 0
    rows: int = 0
    prompt_logprob_rows: int = 0
    multimodal_tokens: int = 0
    lora_tokens: int = 0
    held_bytes: int = 0


NOTHING = StepShape()


class Candidate(NamedTuple):
    """The prefill of one request that wants to join a step.

    Attributes:
        request_id: the engine's.
        wanted: prompt tokens that the engine would compute now, at least 1.
        prompt_tokens: of the whole prompt.
        computed: tokens whose KV is there, from earlier chunks or a cache.
        prompt_logprobs: whether rows of logits are made for the tokens of the prompt.
        held_bytes_per_token: what a token of the prompt keeps until the request ends, beside KV
            (results of prompt logprobs); taken with the first chunk.
        multimodal_tokens: tokens of the chunk that go through an encoder first; they are not cut.
        lora: whether an adapter is applied.
        divisible: whether the engine may compute fewer tokens than `wanted`.
        refusable: false once an answer has begun: such a request waits, and is refused only by an
            engine that is idle and still has no room.
        exempt: health checks, which are always let in.
    """

    request_id: str
    wanted: int
    prompt_tokens: int
    computed: int = 0
    prompt_logprobs: bool = False
    held_bytes_per_token: int = 0
    multimodal_tokens: int = 0
    lora: bool = False
    divisible: bool = True
    refusable: bool = True
    exempt: bool = False

    def joined_to(self, planned: StepShape, tokens: int) -> StepShape:
        """The step with `tokens` tokens of this prompt added."""
        held = 0 if self.computed else self.held_bytes_per_token * self.prompt_tokens
        context = self.computed + tokens
        return StepShape(
            planned.tokens + tokens,
            planned.context + context,
            planned.pairs + tokens * context,
            planned.rows + 1,
            planned.prompt_logprob_rows + (tokens if self.prompt_logprobs else 0),
            planned.multimodal_tokens + self.multimodal_tokens,
            planned.lora_tokens + (tokens if self.lora else 0),
            planned.held_bytes + held,
        )
