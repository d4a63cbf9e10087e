"""Steps that run without being asked about, as long as the largest of them would fit twice.

Away from the cap every prefill is let in, and to find that out anew costs more than it tells. So a
step that was judged clears those behind it: until a number of them have run, memory has become
scarcer, or more requests have come than were reckoned with. Nearer to the cap, where the largest
step would not fit twice, it clears those of fewer tokens.
"""

from __future__ import annotations

import math
import time

from engine_plugins.prefill_gate.prefill_memory import PrefillMemory
from engine_plugins.prefill_gate.rank_meter import Ranks
from engine_plugins.prefill_gate.step_shape import StepShape

__all__ = ["CLEARED_STEPS", "LEAST_TOKENS", "TIMES", "Clearance"]

CLEARED_STEPS = 511
"""Steps between two that are judged, and measured where that is worth it."""
LOOKED_AT_EVERY_S = 0.25
"""How often it is seen what room the ranks have, who look about twice as rarely."""
LEAST_TOKENS = 64
"""To clear steps of even fewer is not worth the asking."""
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
        self._wanted: dict[int, float] = {}
        """Bytes that have to be free, by the tokens of a step."""
        self._tokens, self._wanted_bytes = 0, 0.0
        self._cap: int | None = None
        self._granted = self._settled = 0
        self.left = 0
        """Steps that are cleared and have not run. After `take`, those of no more tokens and rows
        may be taken off here, without a call: between two steps of a model that is what costs."""
        self.looked_until = 0.0
        """Until when, on the monotonic clock, the ranks' room need not be looked at."""
        self.is_bounded = False
        """Whether only steps up to a number of tokens are cleared."""

    @property
    def steps(self) -> int:
        """That were cleared and have run, in all."""
        return self._settled + self._granted - self.left

    def configure(self, configured_cap: int | None) -> None:
        """Go by another cap, or `None` for what is free; the next step is judged."""
        self._cap = configured_cap
        self.withdraw()

    def reset(self) -> None:
        """Have the next step judged, and count anew."""
        self.withdraw()
        self._settled = 0

    def withdraw(self) -> None:
        """Have the next step judged."""
        self._settled = self.steps
        self._granted = self.left = 0
        self.is_bounded = False

    def grant(self, rows: int, headroom_bytes: int) -> None:
        """Clear the next steps, of as many tokens as there is memory for and measurements reach to.

        Args:
            rows: of logits that all requests together may come to add to a step.
            headroom_bytes: of the rank with the least.
        """
        self.withdraw()
        if self._largest is None:
            return
        if self._drawn != self._memory.drawn or not rows <= self._rows <= 2 * rows:
            self._drawn, self._rows = self._memory.drawn, 1 << rows.bit_length()
            self._wanted.clear()
        tokens = self._largest.tokens
        while tokens >= LEAST_TOKENS:
            wanted = self._wanted.get(tokens)
            if wanted is None:
                wanted = self._wanted[tokens] = self._wanted_for(self._largest, tokens)
            if wanted <= headroom_bytes:
                self._tokens, self._wanted_bytes = tokens, wanted
                self._granted = self.left = CLEARED_STEPS
                self.is_bounded = tokens < self._largest.tokens
                return
            tokens //= 2

    def _wanted_for(self, largest: StepShape, tokens: int) -> float:
        """What steps of so many tokens want to have free; infinite where none was measured.

        Of steps up to fewer tokens than the largest has, `take` is told what they attend to.
        """
        is_bounded = tokens < largest.tokens
        step = self._memory.predict(
            largest._replace(
                tokens=tokens,
                context=min(largest.context, tokens) if is_bounded else largest.context,
                pairs=largest.pairs * tokens // largest.tokens,
                lora_tokens=min(largest.lora_tokens, tokens),
                rows=self._rows,
            )
        )
        return TIMES * step.needed_bytes if step.is_proven else math.inf

    def take(self, rows: int, tokens: int) -> bool:
        """Whether the next step may run without being asked about; it counts as run.

        Not to be asked for an engine with nothing in flight, nor where a request wants more than
        tokens.

        Args:
            rows: of logits that all requests together may come to add to a step.
            tokens: that the step has at most, and where context takes memory, that its prompts have
                in all; only looked at if the clearance `is_bounded`.
        """
        if not self.left or rows > self._rows or (self.is_bounded and tokens > self._tokens):
            return False
        now = time.monotonic()
        if now > self.looked_until:
            if self._ranks.room(self._cap) < self._wanted_bytes:
                self.withdraw()
                return False
            self.looked_until = now + LOOKED_AT_EVERY_S
        self.left -= 1
        return True
