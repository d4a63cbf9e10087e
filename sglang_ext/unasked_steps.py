"""Which steps of an SGLang scheduler run without the gate being asked about them.

Those that the gate has cleared, and most of those that only decode. All ranks must find the same,
so where there are several nothing here reads a clock or memory.
"""

from __future__ import annotations

from typing import Any

from engine_plugins.prefill_gate.engine_gate import EngineGate

__all__ = ["UnaskedSteps"]

MANY = 1024
LOOKED_AT_ONE_IN = 16
"""Of steps that only decode, which take the same memory again and again."""


class UnaskedSteps:
    """Of one scheduler.

    Args:
        engine: its gate.
    """

    def __init__(self, engine: EngineGate) -> None:
        self._is_cleared = engine.clearance.take
        self._special: set[str] = set()
        """Requests of the queue that take more than their tokens say, by id."""
        self._passed = 0
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
        if not decodes or scheduler.grammar_manager.grammar_queue:
            self.goes_on = False
        elif (not self._special or not self._asks_for_more(scheduler)) and self._is_cleared(
            min(decodes + waiting + chunked, scheduler.max_running_requests)
        ):
            self.goes_on = True
        else:
            self.goes_on = not waiting and not chunked and self._is_passed()
        return self.goes_on

    def _asks_for_more(self, scheduler: Any) -> bool:
        waiting = {request.rid for request in scheduler.waiting_queue}
        if scheduler.chunked_req is not None:
            waiting.add(scheduler.chunked_req.rid)
        self._special &= waiting
        return bool(self._special)

    def _is_passed(self) -> bool:
        self._passed = (self._passed + 1) % LOOKED_AT_ONE_IN
        return self._passed != 0
