"""A step that ran out of memory although it was let in: lost, and the engine lives.

Where nothing but the step is lost, the worker answers that instead of raising, which would end
vLLM. The scheduler then takes the step back. Elsewhere vLLM ends as ever, and the log says why.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput

__all__ = ["LOST", "can_be_taken_back", "is_out_of_memory", "lose", "take_back"]

LOST = "engine_plugins_lost"
"""Attribute of the output of a worker that lost the step."""
_SAID_BY_ALLOCATORS = ("can't allocate memory", "out of memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator found no memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        said in str(error) for said in _SAID_BY_ALLOCATORS
    )


def can_be_taken_back(config: VllmConfig, scheduler_output: SchedulerOutput) -> bool:
    """Whether a step of this engine can be computed again.

    Not with other ranks, which wait for this one; not where the next step is under way already, or
    another has the KV; not where state is changed in place, or drafts or encoders left some behind.
    """
    return not (
        config.parallel_config.world_size > 1
        or config.scheduler_config.async_scheduling
        or config.use_v2_model_runner
        or config.kv_transfer_config is not None
        or config.speculative_config is not None
        or config.model_config.has_inner_state
        or config.model_config.runner_type != "generate"
        or scheduler_output.scheduled_encoder_inputs
    )


def lose(runner: Any, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
    """Have a runner forget that it began a step; what it answers for it: no token for anybody."""
    runner.execute_model_state = None
    request_ids = list(scheduler_output.num_scheduled_tokens)
    output = ModelRunnerOutput(
        req_ids=request_ids, req_id_to_index={name: at for at, name in enumerate(request_ids)}
    )
    setattr(output, LOST, True)
    return output


def take_back(scheduler: Scheduler, scheduler_output: SchedulerOutput, prefills: set[str]) -> None:
    """Have a scheduler compute a step's tokens again.

    Blocks were entered in the prefix cache when the step was put together, but hold nothing: the
    whole cache is forgotten, except that requests keep the blocks that they hold.

    Args:
        scheduler: that put the step together; the next one must not have been.
        scheduler_output: the step.
        prefills: ids of those requests in it that compute their prompt.
    """
    manager = scheduler.kv_cache_manager
    manager.evict_blocks(set(range(len(manager.block_pool.blocks))))
    for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
        request = scheduler.requests.get(request_id)
        if request is not None and not request.is_finished():
            request.num_computed_tokens -= tokens
            request.is_prefill_chunk = request_id in prefills
