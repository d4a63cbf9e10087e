"""What the gate decided about one prefill, with the figures that it was decided by."""

from __future__ import annotations

from typing import Literal, NamedTuple

from engine_plugins.errors import EnginePluginError, MemoryPressureError, PromptTooLargeError
from engine_plugins.prefill_gate.model_memory import Regime

__all__ = ["OUTCOMES", "Decision", "Outcome"]

Outcome = Literal["run", "shrink", "defer", "reclaim", "too_large", "pressure"]
OUTCOMES: tuple[Outcome, ...] = ("run", "shrink", "defer", "reclaim", "too_large", "pressure")
"""Run it all; run `tokens` of it; ask again at the next step; give memory back and ask again;
refuse it for good; refuse it for now."""


class Decision(NamedTuple):
    """One decision. Bytes are of one rank.

    Attributes:
        outcome: what the engine has to do.
        judged: what it would have to do if the gate were enforced.
        tokens: to compute in this step.
        peak_bytes: predicted for the step, with what it was planned to hold before.
        margin_bytes: on top of it.
        used_bytes: in use before the step.
        cap_bytes: what must not be exceeded.
        regime: the phase that the peak comes from.
        waited_s: seconds since the request was first deferred.
        retry_after_s: when a refusal for now is worth another try.
        largest_prompt: tokens of the largest prompt of this kind that fits, of a refusal for good.
    """

    request_id: str
    outcome: Outcome
    judged: Outcome
    tokens: int
    peak_bytes: int
    margin_bytes: int
    used_bytes: int
    cap_bytes: int
    regime: Regime
    waited_s: float = 0.0
    retry_after_s: int = 0
    largest_prompt: int = 0

    def error(self) -> EnginePluginError | None:
        """The refusal as an error; `None` where nothing is refused."""
        need = (
            f"the prefill needs {_mib(self.peak_bytes)} and a margin of {_mib(self.margin_bytes)}; "
            f"{_mib(self.used_bytes)} of {_mib(self.cap_bytes)} are in use"
        )
        if self.outcome == "too_large":
            return PromptTooLargeError(
                f"this engine can never hold it: {need}",
                remedy=f"send at most {self.largest_prompt} tokens of prompt in this way"
                if self.largest_prompt
                else "ask for less with the prompt (fewer prompt logprobs)",
                largest_prompt=self.largest_prompt,
            )
        if self.outcome == "pressure":
            why = f"no memory came free within {self.waited_s:.0f} s"
            if not self.waited_s:
                why = "there is no memory for even the first of its tokens"
            return MemoryPressureError(
                f"{why}: {need}",
                remedy=f"try again after {self.retry_after_s} s",
                retry_after_s=self.retry_after_s,
            )
        return None


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.1f} MiB"
