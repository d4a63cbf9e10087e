"""The prefill gate in front of a vLLM scheduler.

The scheduler walks its queues as ever. It is answered at the two places where it asks itself about
one request: whether a waiting one may join the step, and how much of one is computed. So what waits
keeps its place, and what the gate does not touch is computed as without it.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from engine_plugins.errors import EnginePluginError, MemoryPressureError
from engine_plugins.prefill_gate.engine_gate import EngineGate
from engine_plugins.prefill_gate.step_shape import Candidate, StepShape
from vllm_ext.lost_step import LOST, take_back
from vllm_ext.prefill_refusal import stop_reason_of
from vllm_ext.prefill_shapes import PrefillShapes, step_shape
from vllm_ext.step_order import NOTHING_TO_DO, ORDER, Order

__all__ = ["GatedScheduler"]

LOOKED_AT_ONE_IN = 16
"""Of steps that only decode, which take the same memory again and again."""
FEW_WAITING = 8
"""Requests whose tokens are counted to find whether they may join a step unasked."""
MAX_LOST = 16
"""Steps in a row that may run out of memory: each gives up a prefill, if it has one."""


class GatedScheduler:
    """One scheduler and its gate; takes the place of seven of the scheduler's methods.

    Three of them, which are called for each request, only in steps that the gate is asked about,
    and the one that says how many tokens are computed only where it may have to say fewer.

    Args:
        scheduler: vLLM's, of either kind.
        gate: asked about each prefill.
        on_host: whether what prompt logprobs keep lies in the memory that the gate watches.
    """

    def __init__(self, scheduler: Scheduler, gate: EngineGate, *, on_host: bool) -> None:
        self._scheduler, self._gate = scheduler, gate
        self._clearance = gate.clearance
        self._most_running = int(scheduler.max_num_running_reqs)
        self._rows_each = 1 + int(scheduler.num_spec_tokens)
        self._shapes = PrefillShapes(scheduler, on_host=on_host)
        self._special: set[str] = set()
        """Requests that take more than their tokens say."""
        self._let_in: dict[str, Candidate] = {}
        self._cut: dict[str, int] = {}
        self._refused: dict[str, EnginePluginError] = {}
        self._ended: list[tuple[Request, EnginePluginError]] = []
        self._hit: tuple[str, Any] = ("", None)
        self._needed_bytes = 0
        self._lost = self._passed = 0
        self._goes_on = False
        """Whether the last step was cleared, and nobody has come since."""
        self._all_decode = False
        """Whether nothing that runs has a prompt left, which lasts as long as nothing waits."""
        self._not_loaded: set[str] = set()
        """Requests that run and have a prompt again, which vLLM notes once it has computed some."""
        for each in scheduler.requests.values():  # of an engine that has served without a gate
            self._note_special(each)
        self._take_over()

    def _take_over(self) -> None:
        scheduler: Any = self._scheduler
        self._add = scheduler.add_request
        self._schedule = scheduler.schedule
        self._is_ready = scheduler._handle_blocked_waiting_request
        self._look_up = scheduler._get_local_prefix_cache_hit
        self._size = scheduler._reserve_prefill_lookahead
        self._update = scheduler.update_from_output
        self._free = scheduler._free_request
        scheduler.add_request = self.add_request
        scheduler.schedule = self.schedule
        scheduler.update_from_output = self.update_from_output
        scheduler._free_request = self.free_request

    def _answer(self, *, gated: bool) -> None:
        """Answer what the scheduler asks itself about each request, or have it do so."""
        scheduler: Any = self._scheduler
        scheduler._handle_blocked_waiting_request = self.is_ready if gated else self._is_ready
        scheduler._get_local_prefix_cache_hit = self.look_up if gated else self._look_up
        if not gated:
            scheduler._reserve_prefill_lookahead = self._size

    def _answer_sizes(self) -> None:
        scheduler: Any = self._scheduler
        scheduler._reserve_prefill_lookahead = self.size

    def add_request(self, request: Request) -> None:
        """A request has come."""
        self._goes_on = False
        self._note_special(request)
        self._add(request)

    def _note_special(self, request: Request) -> None:
        params = request.sampling_params
        if request.mm_features or (params is not None and params.prompt_logprobs is not None):
            self._special.add(request.request_id)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Put a step together, with the prefills that the gate lets in."""
        output: SchedulerOutput
        scheduler, clearance = self._scheduler, self._clearance
        # Nobody has come since a cleared step, see `Clearance.left`. Who waits all the same was
        # preempted, or goes on with a session, and may have more tokens than were counted.
        if (
            self._goes_on
            and clearance.left
            and scheduler.running
            and time.monotonic() < clearance.looked_until
            and not (clearance.is_bounded and (scheduler.waiting or scheduler.kv_holding_waiting))
        ):
            clearance.left -= 1
            output = self._schedule(*args, **kwargs)
            setattr(output, ORDER, NOTHING_TO_DO)
            return output
        self._goes_on = False
        if not self._gate.is_on:
            self._all_decode = False
            return self._schedule(*args, **kwargs)
        rows = min(len(scheduler.requests), self._most_running) * self._rows_each
        is_bounded = clearance.is_bounded
        tokens = self._most_tokens() if is_bounded else 0
        clear = scheduler.running and not self._special and clearance.take(rows, tokens)
        if clear or self._may_pass():
            output = self._schedule(*args, **kwargs)
            self._goes_on = bool(clear)
            if clear and not is_bounded:  # nobody has seen who waited
                self._all_decode = False
            self._let_in.clear()
            setattr(output, ORDER, NOTHING_TO_DO)
            return output
        self._begin()
        self._answer(gated=True)
        try:
            output = self._schedule(*args, **kwargs)
        finally:
            self._answer(gated=False)
        if self._refused:
            self._end_refused()
        if self._not_loaded:
            self._not_loaded.difference_update(output.num_scheduled_tokens)
        shape = step_shape(output, self._let_in)
        order = self._gate.order(shape, rows=rows)
        if shape.tokens or order.give_back:
            setattr(output, ORDER, Order(order, self._needed_bytes))
        return output

    def is_ready(self, request: Request) -> bool:
        """Whether a waiting request may join this step."""
        if not self._is_ready(request):
            return False
        computed = request.num_computed_tokens or self._cached(request)
        room = self._scheduler.max_num_scheduled_tokens - self._gate.gate.planned.tokens
        return self._ask(request, computed, min(request.num_tokens - computed, max(room, 1))) > 0

    def look_up(self, request: Request) -> Any:
        """The prefix cache's hit, once for the gate and the scheduler."""
        known, hit = self._hit
        if known != request.request_id:
            return self._look_up(request)
        self._hit = ("", None)
        return hit

    def size(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """How many tokens of a request are computed now."""
        tokens = num_new_tokens
        if tokens:
            if request.status == RequestStatus.RUNNING and self._has_prompt(request):
                self._ask(request, num_computed_tokens, tokens)
                tokens = min(tokens, self._cut.get(request.request_id, tokens))
            elif request.request_id in self._cut:
                tokens = min(tokens, self._cut[request.request_id])
        return int(self._size(request, num_computed_tokens, tokens))

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Add the ends of refused requests to what a step gave; take a lost step back."""
        if hasattr(model_runner_output, LOST):
            self._recover(scheduler_output)
        else:
            self._lost = 0
        outputs: dict[int, EngineCoreOutputs] = self._update(scheduler_output, model_runner_output)
        loaded = model_runner_output.kv_connector_output
        if loaded is not None and loaded.invalid_block_ids:
            self._see_what_was_not_loaded()
        if self._ended:
            self._add_ends(outputs)
        return outputs

    def _see_what_was_not_loaded(self) -> None:
        """KV that a connector had promised is to be computed."""
        self._all_decode = self._goes_on = False
        self._not_loaded = {
            each.request_id
            for each in self._scheduler.running
            if each.num_computed_tokens + 1 < each.num_tokens + each.num_output_placeholders
        }

    def _add_ends(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        for request, refusal in self._ended:
            to_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            to_client.outputs.append(_end_of(request, refusal))
        self._ended.clear()

    def free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """A request has ended."""
        freed = self._free(request, *args, **kwargs)
        self._special.discard(request.request_id)
        self._not_loaded.discard(request.request_id)
        if self._gate.is_on:
            self._gate.forget([request.request_id], idle=not self._scheduler.requests)
        return freed

    def _only_decodes(self) -> bool:
        """Whether no prompt is left to be computed."""
        scheduler = self._scheduler
        if scheduler.waiting or scheduler.kv_holding_waiting:
            self._all_decode = False
        elif not self._all_decode:
            self._all_decode = not self._prompts()
        return self._all_decode

    def _prompts(self) -> list[Request]:
        """Of those that run, who has a prompt left."""
        running = self._scheduler.running
        if self._not_loaded:
            return [each for each in running if self._has_prompt(each)]
        return [each for each in running if each.is_prefill_chunk]

    def _has_prompt(self, request: Request) -> bool:
        return request.is_prefill_chunk or request.request_id in self._not_loaded

    def _most_tokens(self) -> int:
        """Of the next step, if few wait for it; else more than any has."""
        scheduler = self._scheduler
        requests = len(scheduler.running)
        if self._only_decodes():
            return requests * self._rows_each
        waiting = [*scheduler.waiting, *scheduler.kv_holding_waiting]
        if len(waiting) > FEW_WAITING:
            return sys.maxsize
        tokens = (requests + len(waiting)) * self._rows_each
        for each in (*waiting, *self._prompts()):
            tokens += each.num_tokens - each.num_computed_tokens
        return tokens

    def _may_pass(self) -> bool:
        """Whether a step has no prefill, and need not be looked at for once."""
        if not self._only_decodes():
            return False
        self._passed = (self._passed + 1) % LOOKED_AT_ONE_IN
        return self._passed != 0

    def _begin(self) -> None:
        self._let_in.clear()
        self._cut.clear()
        self._hit = ("", None)
        self._needed_bytes = 0
        prompts = len(self._prompts())
        decodes = len(self._scheduler.running) - prompts
        if prompts:
            self._answer_sizes()
        tokens = decodes * self._rows_each
        self._gate.begin(
            self._gate.figures(),
            running=StepShape(tokens=tokens, rows=tokens),
            in_flight=decodes > 0,
        )

    def _cached(self, request: Request) -> int:
        self._hit = (request.request_id, self._look_up(request))
        return int(self._hit[1][1])

    def _ask(self, request: Request, computed: int, wanted: int) -> int:
        """Ask the gate about a prefill; the tokens that it grants."""
        candidate = self._shapes.candidate(request, computed, wanted)
        decision = self._gate.decide(candidate)
        if decision.tokens:
            self._needed_bytes = decision.peak_bytes + decision.margin_bytes
        if decision.outcome == "run":
            self._let_in[request.request_id] = candidate
            return wanted
        granted = self._shapes.aligned(computed, decision.tokens)
        self._cut[request.request_id] = granted
        self._answer_sizes()
        if granted:
            self._let_in[request.request_id] = candidate
        refusal = decision.error()
        if refusal is not None:
            self._refused[request.request_id] = refusal
        return granted

    def _recover(self, scheduler_output: SchedulerOutput) -> None:
        """All is computed again but what needed most, and what left results in the worker.

        Raises:
            MemoryError: it was tried often, and nothing is left to be given up.
        """
        self._lost += 1
        if self._lost > MAX_LOST:
            raise MemoryError(f"{self._lost} steps in a row found no memory")
        prefills = self._shapes.prefills(scheduler_output, self._let_in)
        take_back(self._scheduler, scheduler_output, set(prefills))
        self._gate.ran_out(step_shape(scheduler_output, prefills))
        largest = max(prefills, key=scheduler_output.num_scheduled_tokens.__getitem__, default=None)
        for request_id, candidate in prefills.items():
            if candidate.prompt_logprobs or request_id == largest:
                self._refused[request_id] = MemoryPressureError(
                    "the engine ran out of memory while it computed the prompt",
                    remedy="try again, or send fewer tokens",
                )
        self._end_refused()

    def _end_refused(self) -> None:
        ended = self._scheduler.finish_requests(self._refused, RequestStatus.FINISHED_ERROR)
        self._ended += [(request, self._refused[request.request_id]) for request in ended]
        self._refused.clear()


def _end_of(request: Request, refusal: EnginePluginError) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=FinishReason.ERROR,
        stop_reason=stop_reason_of(refusal),
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )
