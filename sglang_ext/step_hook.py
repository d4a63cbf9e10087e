"""Each step of an SGLang rank, measured where the gate asks for it, and survived if memory ends.

A forward that runs out of memory ends SGLang's scheduler, and with it the server. Here its requests
are ended instead, what they hold is given back, and the loop goes on with all others. That is done
where there is one rank: of several the others would wait for this one.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.disaggregation.utils import prepare_abort
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.mem_cache.common import release_kv_cache

from engine_plugins.errors import MemoryPressureError
from sglang_ext.lost_step import StepLostError
from sglang_ext.prefill_gate import SchedulerGate, gate_of
from sglang_ext.refused_prefill import RefusedPrefill

__all__ = ["is_out_of_memory", "run_batch"]

logger = logging.getLogger(__name__)

_TEXTS = ("can't allocate memory", "out of memory", "bad_alloc", "bad allocation")
"""What torch's allocators, C++ and SGLang say, in errors of no type of their own."""


def run_batch(original: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `Scheduler.run_batch`: the forward, its sampling, and its prompt logprobs.

    Raises:
        StepLostError: for the loop.
    """
    gate = gate_of(scheduler)
    if gate is None or not gate.engine.is_on:
        return original(scheduler, batch, *args, **kwargs)
    meter = gate.meter
    if not gate.unasked.goes_on:
        meter.before(gate.order(scheduler, batch))
    meter.step = batch
    try:
        result = original(scheduler, batch, *args, **kwargs)
    except Exception as error:
        meter.after(completed=False)
        if not is_out_of_memory(error) or not _may_go_on(scheduler, batch, error):
            raise
        gate.engine.ran_out(gate.shapes.batch(batch))
        _end_batch(scheduler, batch, gate, error)
        raise StepLostError(meter.memory.give_back) from error
    meter.step = None
    if meter.is_due:
        meter.after()
    return result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(each in text for each in _TEXTS)


def _may_go_on(scheduler: Any, batch: Any, error: Exception) -> bool:
    """Whether what the step had begun can be undone; if not, the log says why."""
    reasons = {
        "several ranks compute together": torch.distributed.get_world_size(scheduler.tp_cpu_group)
        > 1,
        "it decodes speculatively": not scheduler.spec_algorithm.is_none(),
        "the model keeps states beside its KV": scheduler.tree_cache.supports_mamba(),
        "the step computes beams": any(each.beam_group is not None for each in batch.reqs),
    }
    why = [reason for reason, holds in reasons.items() if holds]
    if why:
        logger.error("a step ran out of memory, and this engine ends: %s: %s", why[0], error)
    return not why


def _end_batch(scheduler: Any, batch: Any, gate: SchedulerGate, error: Exception) -> None:
    """End its requests, give their KV back, and leave the scheduler as between two steps."""
    logger.error("a step ran out of memory; its %d requests are ended: %s", len(batch.reqs), error)
    refusal = MemoryPressureError(
        "memory ended while it was computed",
        remedy="try again later, or with a shorter prompt",
        retry_after_s=gate.engine.gate.retry_after_s(),
    )
    reason = RefusedPrefill(refusal)
    while scheduler.result_queue:  # of steps that overlap, the one before has its tokens
        scheduler.process_batch_result(*scheduler.result_queue.popleft())
    for request in batch.reqs:
        if request.finished():
            continue
        prepare_abort(request, reason.message, reason.status_code)
        request.to_finish = None
        scheduler._release_aborted_request(request)
        release_kv_cache(request, scheduler.tree_cache, checkpoint=False)
        scheduler.send_abort_output(
            AbortReq(rid=request.rid, finished_reason=reason.to_json()), request
        )
    if scheduler.chunked_req in batch.reqs:
        scheduler.chunked_req = scheduler._pending_chunked_abort_req = None
    if scheduler.running_batch is batch:
        scheduler.running_batch = ScheduleBatch(reqs=[], batch_is_full=False)
    scheduler.running_batch.batch_is_full = False
    # The step before has been merged into the running ones.
    scheduler.last_batch = scheduler.cur_batch_for_debug = None
