"""Steps that run without being asked about, as long as the largest of them would fit twice.

Away from the cap every prefill is let in, and to find that out anew costs more than it tells. So a
step that was judged clears those behind it: until a number of them have run, memory has become
scarcer, or more requests have come than were reckoned with.
"""

from __future__ import annotations

import time

from engine_plugins.prefill_gate.prefill_memory import PrefillMemory
from engine_plugins.prefill_gate.rank_meter import Ranks
from engine_plugins.prefill_gate.step_shape import StepShape

__all__ = ["CLEARED_STEPS", "TIMES", "Clearance"]

CLEARED_STEPS = 511
"""Steps between two that are judged, and measured where that is worth it."""
LOOKED_AT_EVERY = 7
"""Steps after which it is seen what room the ranks have."""
STOOD_STILL_S = 0.5
"""A pause after which it is seen at once: others were awake meanwhile."""
TIMES = 2
"""How often the largest step has to fit: others take memory too, between two looks at it."""


class Clearance:
    """Of one scheduler that decides alone.

    Args:
        memory: predicts what the largest step needs.
        ranks: say what room they have.
        largest: a step of as many tokens as the engine ever computes at once, of requests that ask
            for no more than tokens (no prompt logprobs, no encoder); its rows do not count. `None`
            clears nothing.
    """

    def __init__(self, memory: PrefillMemory, ranks: Ranks, largest: StepShape | None) -> None:
        self._memory, self._ranks, self._largest = memory, ranks, largest
        self._drawn = -1
        self._rows = 0
        self._wanted_bytes = 0.0
        self._left, self._taken_at = 0, 0.0
        self._cap: int | None = None
        self.steps = 0
        """That were cleared, in all."""

    def configure(self, configured_cap: int | None) -> None:
        """Go by another cap, or `None` for what is free; the next step is judged."""
        self._cap = configured_cap
        self.withdraw()

    def reset(self) -> None:
        """Have the next step judged, and count anew."""
        self.steps = 0
        self.withdraw()

    def withdraw(self) -> None:
        """Have the next step judged."""
        self._left = 0

    def grant(self, rows: int, headroom_bytes: int) -> None:
        """Clear the next steps, if there is memory enough and measurements say so, or none.

        Args:
            rows: of logits that all requests together may come to add to a step.
            headroom_bytes: of the rank with the least.
        """
        if self._largest is None:
            return
        if self._drawn != self._memory.drawn or not rows <= self._rows <= 2 * rows:
            self._drawn, self._rows = self._memory.drawn, 1 << rows.bit_length()
            step = self._memory.predict(self._largest._replace(rows=self._rows))
            self._wanted_bytes = TIMES * step.needed_bytes if step.is_proven else float("inf")
        self._left = CLEARED_STEPS if headroom_bytes >= self._wanted_bytes else 0

    def take(self, rows: int) -> bool:
        """Whether the next step may run without being asked about; it counts as run.

        Not to be asked for an engine with nothing in flight, nor where a request wants more than
        tokens.

        Args:
            rows: of logits that all requests together may come to add to a step.
        """
        left = self._left
        if not left or rows > self._rows:
            return False
        now = time.monotonic()
        is_due = not left % LOOKED_AT_EVERY or now - self._taken_at > STOOD_STILL_S
        if is_due and self._ranks.room(self._cap) < self._wanted_bytes:
            self.withdraw()
            return False
        self._left, self._taken_at = left - 1, now
        self.steps += 1
        return True
