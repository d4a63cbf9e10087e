"""Which steps of an SGLang scheduler run without the gate being asked about them.

Those that the gate has cleared, and most of those that only decode. All ranks must find the same,
so where there are several nothing here reads a clock or memory.
"""

from __future__ import annotations

import sys
from typing import Any

from engine_plugins.prefill_gate.clearance import Clearance

__all__ = ["UnaskedSteps"]

MANY = 1024
FEW_WAITING = 8
"""Requests whose tokens are counted to find whether they may join a step unasked."""
LOOKED_AT_ONE_IN = 16
"""Of steps that only decode, which take the same memory again and again."""


class UnaskedSteps:
    """Of one scheduler.

    Args:
        clearance: of its gate.
    """

    def __init__(self, clearance: Clearance) -> None:
        self._clearance = clearance
        self._special: set[str] = set()
        """Requests of the queue that take more than their tokens say, by id."""
        self._decode_steps = 0
        self.goes_on = False
        """Whether the step that is being put together, or runs, is one."""

    def note(self, scheduler: Any, request: Any) -> None:
        """A request is about to join the queue."""
        if request.return_logprob or request.multimodal_inputs is not None:
            if len(self._special) >= 2 * len(scheduler.waiting_queue) + MANY:
                self._asks_for_more(scheduler)  # nobody has asked for long
            self._special.add(request.rid)

    def begin(self, scheduler: Any, running_batch: Any) -> bool:
        """Whether the next step is one."""
        decodes, waiting = len(running_batch.reqs), len(scheduler.waiting_queue)
        chunked = scheduler.chunked_req is not None
        only_decodes = not waiting and not chunked
        self._decode_steps += only_decodes
        if not decodes or scheduler.grammar_manager.grammar_queue:
            self.goes_on = False
        elif only_decodes and self._decode_steps % LOOKED_AT_ONE_IN:
            self.goes_on = True
        elif self._special and self._asks_for_more(scheduler):
            self.goes_on = False
        else:
            self.goes_on = self._clearance.take(
                min(decodes + waiting + chunked, scheduler.max_running_requests),
                self._most_tokens(scheduler, decodes) if self._clearance.is_bounded else 0,
            )
        return self.goes_on

    def _most_tokens(self, scheduler: Any, decodes: int) -> int:
        """Of the prompts that may join the next step, if they are few; else more than any has."""
        prompts = scheduler.waiting_queue
        if len(prompts) > FEW_WAITING or scheduler.is_mixed_chunk:
            return sys.maxsize
        if scheduler.chunked_req is not None:
            prompts = [*prompts, scheduler.chunked_req]
        return decodes + sum(
            [len(each.origin_input_ids) + len(each.output_ids) for each in prompts]
        )

    def _asks_for_more(self, scheduler: Any) -> bool:
        waiting = {request.rid for request in scheduler.waiting_queue}
        if scheduler.chunked_req is not None:
            waiting.add(scheduler.chunked_req.rid)
        self._special &= waiting
        return bool(self._special)
