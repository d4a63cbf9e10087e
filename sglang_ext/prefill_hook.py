"""The prefill gate in front of SGLang's prefill batches.

SGLang builds a batch from its queue, in order, up to a number of tokens. The gate is asked about
the first of the queue beforehand. SGLang is then shown those that may run, with no more tokens than
may run; all others keep their places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_policy import CacheAgnosticPolicy

from engine_plugins.errors import EnginePluginError
from engine_plugins.prefill_gate.decision import Decision
from engine_plugins.prefill_gate.step_shape import NOTHING, StepShape
from sglang_ext.prefill_gate import SchedulerGate, cut_step, gate_of
from sglang_ext.refused_prefill import RefusedPrefill

__all__ = ["before_queueing", "end_queued", "get_new_batch_prefill"]


class _Choice(NamedTuple):
    """Who may run, and how many tokens of them in all; `None` if SGLang's own limit will do."""

    requests: list[Any]
    tokens: int | None


def before_queueing(scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """Before `Scheduler._add_request_to_queue`."""
    gate = gate_of(scheduler)
    if gate is not None:
        gate.unasked.note(scheduler, request)


def get_new_batch_prefill(original: Any, scheduler: Any, *, running_batch: Any, **rest: Any) -> Any:
    """Around `Scheduler._get_new_batch_prefill_raw`."""
    gate = gate_of(scheduler)
    if gate is None or not gate.engine.is_on or gate.unasked.begin(scheduler, running_batch):
        return original(scheduler, running_batch=running_batch, **rest)
    _queue_compiled(scheduler)
    attempt = _Attempt(gate, scheduler, running_batch)
    if not attempt.begin():
        return original(scheduler, running_batch=running_batch, **rest)
    choice = attempt.choose()
    if choice is None:
        attempt.give_back_if_idle()
        return None, running_batch
    with _shown(scheduler, choice):
        return original(scheduler, running_batch=running_batch, **rest)


class _Attempt:
    """One attempt to build a batch."""

    def __init__(self, gate: SchedulerGate, scheduler: Any, running_batch: Any) -> None:
        self._gate, self._scheduler = gate, scheduler
        self._running, self._decodes = running_batch, len(running_batch.reqs)
        self._mixed = self._decodes if scheduler.is_mixed_chunk else 0
        self._step = cut_step(scheduler)
        self._places = 0

    def begin(self) -> bool:
        """Whether there is anything to ask the gate about."""
        scheduler, engine = self._scheduler, self._gate.engine
        waits = bool(scheduler.waiting_queue) or scheduler.chunked_req is not None
        self._gate.forget_gone(scheduler, idle=not waits and not self._decodes)
        self._places = self._free_places() if waits else 0
        if not self._places and scheduler.chunked_req is None:
            return False
        figures = self._gate.figures()
        if figures is None:
            return False
        running = StepShape(tokens=self._mixed, rows=self._mixed) if self._mixed else NOTHING
        engine.begin(figures, running=running, in_flight=self._decodes > 0)
        return True

    def choose(self) -> _Choice | None:
        """Who may run; `None` if nobody may."""
        scheduler = self._scheduler
        limit: int | None = scheduler.chunked_prefill_size
        used = self._mixed
        if scheduler.chunked_req is not None:
            decision = self._ask(scheduler.chunked_req, _left(limit, used), refusable=False)
            if decision.tokens == 0:
                self._give_up(scheduler.chunked_req, decision.error())
                return None
            if decision.outcome == "shrink":
                return _Choice([], used + self._whole_steps(decision.tokens))
            used += self._padded(decision.tokens)
        return self._from_queue(limit, used)

    def give_back_if_idle(self) -> None:
        """An order to give memory back goes with a step; with none to come it is followed now."""
        if self._decodes:
            return
        order = self._gate.engine.order(NOTHING)
        if order.give_back:
            self._gate.meter.before(order)
            self._gate.meter.after()

    def _from_queue(self, limit: int | None, used: int) -> _Choice | None:
        scheduler = self._scheduler
        let_in: list[Any] = []
        refused: list[tuple[Any, EnginePluginError]] = []
        total = None
        for request in self._queue()[: self._places]:
            left = _left(limit, used)
            if (left is not None and left <= 0) or used >= scheduler.max_prefill_tokens:
                break
            self._match(request)
            decision = self._ask(request, left, refusable=not request.stream)
            refusal = decision.error()
            if refusal is not None:
                refused.append((request, refusal))
            elif decision.outcome == "shrink":
                let_in.append(request)
                total = used + self._whole_steps(decision.tokens)
                break
            elif decision.tokens:
                let_in.append(request)
                used += self._padded(decision.tokens)
            else:
                self._gate.deferred.add(request.rid)
        for request, refusal in refused:
            end_queued(scheduler, request, refusal)
        if not let_in and scheduler.chunked_req is None:
            return None
        return _Choice(let_in, total)

    def _queue(self) -> list[Any]:
        """In the order in which SGLang would take them."""
        scheduler = self._scheduler
        if (
            scheduler.policy.policy != CacheAgnosticPolicy.FCFS
            or scheduler.enable_priority_scheduling
        ):
            scheduler.policy.calc_priority(
                scheduler.waiting_queue,
                self._running,
                processed_tokens=scheduler.processed_tokens_counter,
            )
        return list(scheduler.waiting_queue)

    def _match(self, request: Any) -> None:
        """Have SGLang look up what its cache holds of a prompt, as it does for its batch."""
        cache = self._scheduler.tree_cache
        if cache.supports_mamba():
            # Here a look-up takes memory for a state.
            request.refresh_fill_ids()
        else:
            request.init_next_round_input(cache)

    def _ask(self, request: Any, limit: int | None, *, refusable: bool) -> Decision:
        candidate = self._gate.shapes.candidate(request, limit, refusable=refusable)
        return self._gate.engine.decide(candidate)

    def _free_places(self) -> int:
        """Requests that SGLang could take, whatever their size."""
        scheduler = self._scheduler
        waiting: int = len(scheduler.waiting_queue)
        if scheduler.enable_priority_preemption:
            return waiting
        if self._running.batch_is_full and self._decodes and not scheduler.is_hybrid_swa:
            return 0
        free: int = scheduler.get_num_allocatable_reqs(self._decodes, running_batch=self._running)
        return max(min(free, waiting), 0)

    def _give_up(self, request: Any, refusal: EnginePluginError | None) -> None:
        """Have SGLang end a prompt that it has begun, before its next batch."""
        if refusal is not None:
            request.discard_output_reason = RefusedPrefill(refusal)
            self._scheduler._pending_chunked_abort_req = request

    def _whole_steps(self, tokens: int) -> int:
        return max(tokens // self._step, 1) * self._step

    def _padded(self, tokens: int) -> int:
        page: int = self._scheduler.page_size
        return -(-tokens // page) * page


class _shown:
    """Has SGLang see those who may run alone, and afterwards all again, in their order."""

    def __init__(self, scheduler: Any, choice: _Choice) -> None:
        self._scheduler, self._choice = scheduler, choice
        self._queue: list[Any] = scheduler.waiting_queue
        self._limit = scheduler.chunked_prefill_size
        self._compiling = scheduler.grammar_manager.grammar_queue

    def __enter__(self) -> None:
        scheduler = self._scheduler
        scheduler.waiting_queue = list(self._choice.requests)
        # What becomes ready now would join without having been asked about.
        scheduler.grammar_manager.grammar_queue = []
        if self._choice.tokens is not None:
            scheduler.chunked_prefill_size = self._choice.tokens

    def __exit__(self, *raised: object) -> None:
        scheduler = self._scheduler
        scheduler.chunked_prefill_size = self._limit
        scheduler.grammar_manager.grammar_queue = self._compiling
        shown, left = set(self._choice.requests), scheduler.waiting_queue
        gone = shown.difference(left)
        joined = [request for request in left if request not in shown]
        scheduler.waiting_queue = [each for each in self._queue if each not in gone] + joined


def end_queued(scheduler: Any, request: Any, refusal: EnginePluginError) -> None:
    """End a request of the queue with an error, as SGLang ends one that is aborted there."""
    scheduler.waiting_queue.remove(request)
    scheduler._release_aborted_request(request)
    scheduler.beam_coordinator.retire_group(request)
    reason = RefusedPrefill(refusal).to_json()
    scheduler.send_abort_output(AbortReq(rid=request.rid, finished_reason=reason), request)


def _queue_compiled(scheduler: Any) -> None:
    """What SGLang does first of all when it builds a batch."""
    if scheduler.grammar_manager.has_waiting_grammars():
        for request in scheduler.grammar_manager.get_ready_grammar_requests():
            scheduler._add_request_to_queue(request)


def _left(limit: int | None, used: int) -> int | None:
    return None if limit is None else limit - used
