"""What vLLM's requests and steps compute, in the gate's terms."""

from __future__ import annotations

from collections.abc import Container, Mapping

from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from engine_plugins.prefill_gate.step_shape import Candidate, StepShape
from vllm_ext.held_stream import is_marked_as_held

__all__ = ["PrefillShapes", "held_bytes_per_token", "step_shape"]


class PrefillShapes:
    """The shapes of one scheduler's prefills.

    Args:
        scheduler: vLLM's, of either kind.
        on_host: whether what prompt logprobs keep lies in the memory that the gate watches.
    """

    def __init__(self, scheduler: Scheduler, *, on_host: bool) -> None:
        self._scheduler, self._on_host = scheduler, on_host
        self._divisible = bool(scheduler.scheduler_config.enable_chunked_prefill)

    def candidate(self, request: Request, computed: int, wanted: int) -> Candidate:
        """The prefill that a request would begin or go on with.

        Args:
            request: vLLM's.
            computed: its tokens that need not be computed any more.
            wanted: those that the scheduler would compute in this step.
        """
        params = request.sampling_params
        logprobs = params is not None and params.prompt_logprobs is not None
        return Candidate(
            request.request_id,
            wanted,
            request.num_tokens,
            computed,
            prompt_logprobs=logprobs and not request.num_output_tokens,
            held_bytes_per_token=held_bytes_per_token(params.prompt_logprobs)
            if logprobs and self._on_host
            else 0,
            multimodal_tokens=_encoder_tokens(request, computed, wanted),
            lora=request.lora_request is not None,
            divisible=self._divisible,
            refusable=_is_refusable(request),
        )

    def aligned(self, computed: int, tokens: int) -> int:
        """How many of the granted tokens to compute: some models keep state at block ends only."""
        if not self._scheduler.need_mamba_block_aligned_split:
            return tokens
        return max(tokens - (computed + tokens) % int(self._scheduler.block_size), 0)

    def prefills(self, output: SchedulerOutput, asked: Container[str]) -> dict[str, Candidate]:
        """Those of a step that has been put together: also of requests that were asked about."""
        found = {}
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = self._scheduler.requests.get(request_id)
            if request is None or request.is_finished():
                continue
            computed = request.num_computed_tokens - tokens
            if request.num_tokens - computed > 1 or request_id in asked:
                found[request_id] = self.candidate(request, computed, tokens)
        return found


def step_shape(output: SchedulerOutput, let_in: Mapping[str, Candidate]) -> StepShape:
    """Of the step as it runs: let in does not mean that there was room for its KV."""
    scheduled = output.num_scheduled_tokens
    prefills = [
        (candidate, scheduled[request_id])
        for request_id, candidate in let_in.items()
        if request_id in scheduled
    ]
    decodes = output.total_num_scheduled_tokens - sum(tokens for _, tokens in prefills)
    shape = StepShape(tokens=decodes, rows=decodes)
    for candidate, tokens in prefills:
        shape = candidate.joined_to(shape, tokens)
    return shape


def held_bytes_per_token(prompt_logprobs: int) -> int:
    """What vLLM keeps of a prompt token's log-probabilities: ids, values and a rank."""
    return 8 * (prompt_logprobs + 1) + 4


def _is_refusable(request: Request) -> bool:
    """Whether nothing of an answer can have been sent: it is one message, or held."""
    params = request.sampling_params
    if params is None:
        return True
    if request.resumable:
        return False
    if params.output_kind == RequestOutputKind.FINAL_ONLY:
        return True
    return is_marked_as_held(params) and request.num_output_tokens == 0


def _encoder_tokens(request: Request, computed: int, wanted: int) -> int:
    return sum(
        feature.mm_position.get_num_embeds()
        for feature in request.mm_features
        if feature.mm_position.offset < computed + wanted
        and feature.mm_position.offset + feature.mm_position.length > computed
    )
