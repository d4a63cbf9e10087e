"""A step that ran out of memory and is undone: SGLang's event loop begins anew and goes on.

Around the loop, not within it: a step costs nothing more, and this can be there before a gate is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["StepLostError", "run_loop"]


class StepLostError(Exception):
    """A step ran out of memory, and all that it had begun is undone.

    Args:
        give_back: frees what the step's frames held, once they are gone.
    """

    def __init__(self, give_back: Callable[[], None]) -> None:
        super().__init__("a step ran out of memory")
        self.give_back = give_back


def run_loop(original: Any, scheduler: Any) -> None:
    """Around `Scheduler.event_loop_normal` and `event_loop_overlap`: a lost step ends neither."""
    while True:
        try:
            original(scheduler)
            return
        except StepLostError as lost:
            give_back = lost.give_back
        give_back()
