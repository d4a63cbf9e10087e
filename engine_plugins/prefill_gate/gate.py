"""The gate in front of every prefill: what may run in this step, and what becomes of the rest.

What does not fit is made smaller, then deferred, then memory is reclaimed once, then the request is
refused. An idle engine runs at least the smallest chunk of whatever may be cut, so nothing that was
measured or read in the past can shut it for good. Only where there is no memory for that chunk, by
the model's sizes and as of now, is it refused: it would cost the engine.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import NamedTuple

from engine_plugins.prefill_gate.decision import OUTCOMES, Decision, Outcome
from engine_plugins.prefill_gate.gate_report import GateReport, GateSettings
from engine_plugins.prefill_gate.high_water import HighWater
from engine_plugins.prefill_gate.memory_cap import Reading
from engine_plugins.prefill_gate.prefill_memory import Prediction, PrefillMemory
from engine_plugins.prefill_gate.step_shape import NOTHING, Candidate, StepShape
from engine_plugins.prefill_gate.waiting_line import PATIENCE_S, WaitingLine
from engine_plugins.settings import Settings

__all__ = ["PrefillGate"]

logger = logging.getLogger(__name__)

MAX_WAIT_S = 30.0
"""How long a request is deferred before it is refused for now."""
RECLAIM_GAP_S = 10.0
"""The least time between two reclaims: each costs a step, and the second finds little."""
MAX_RETRY_AFTER_S = 60


class _Fit(NamedTuple):
    """A prefill's tokens added to the step."""

    tokens: int
    shape: StepShape
    prediction: Prediction


class PrefillGate:
    """Decides for one engine; ranks that must agree give their gates the same figures.

    A step is `begin`, then `decide` for each prefill in the order of the engine's queue; what is
    let in adds up in `planned`. Nothing here reads a clock or measures.

    Args:
        memory: predicts peaks.
        settings: the mode; `configure` changes it.
        smallest_chunk: tokens that an idle engine runs whatever the prediction; calibrate with it.
    """

    def __init__(self, memory: PrefillMemory, settings: Settings, *, smallest_chunk: int) -> None:
        self.memory = memory
        self._smallest = smallest_chunk
        self._forget_all()
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take new settings; what was measured stays, and nobody waits for an old decision."""
        self._settings, self._mode = settings, settings.prefill_gate
        self.memory.configure(
            margin_quantile=settings.prefill_margin_quantile,
            margin_bytes=settings.prefill_margin_bytes,
        )
        self._line.clear()
        self._water.recap(settings.prefill_cap_bytes)

    def reset(self) -> None:
        """Forget measurements, readings, who waits, and counters."""
        self.memory.reset()
        self._forget_all()

    def _forget_all(self) -> None:
        self._line = WaitingLine()
        self._water = HighWater()
        self._reclaimed: set[str] = set()
        self._reclaimed_at: float | None = None
        self._usual_wait_s = 1.0
        self.deferred_s = 0.0
        """Seconds that requests which were let in had waited, in all."""
        self.exceeded = 0
        """Measured steps that took more than was predicted with its margin."""
        self.decisions: Counter[Outcome] = Counter(dict.fromkeys(OUTCOMES, 0))
        self.planned = NOTHING
        self._reading = Reading(0, 0)
        self._in_flight, self._now = False, 0.0

    @property
    def is_on(self) -> bool:
        """Whether an engine has to ask at all."""
        return self._mode != "off"

    @property
    def waiting(self) -> int:
        """Requests that are deferred."""
        return len(self._line)

    @property
    def headroom_bytes(self) -> int:
        """What was left when the step began."""
        return self._reading.headroom_bytes

    @property
    def refuses(self) -> bool:
        """Whether its word counts."""
        return self._mode == "enforce"

    def begin(
        self, reading: Reading, *, running: StepShape = NOTHING, in_flight: bool, now: float
    ) -> None:
        """Begin a step.

        Args:
            reading: memory in use, between two steps.
            running: what the step computes whatever is decided: tokens of decodes.
            in_flight: whether any request but those that will be asked about is being served.
            now: seconds of a clock that does not go back.
        """
        self.planned = running
        self._in_flight, self._now = in_flight or running.tokens > 0, now
        self._reading = self._water.read(reading, in_flight=self._in_flight)

    def decide(self, candidate: Candidate) -> Decision:
        """Judge one prefill, and plan with it if it may run."""
        judged, fit = self._judge(candidate)
        outcome = judged
        if self._mode != "enforce" and judged != "run":
            outcome, fit = "run", self._fit(candidate, candidate.wanted)
        runs = outcome in ("run", "shrink")
        if runs:
            self.planned = fit.shape
        prediction = fit.prediction
        decision = Decision(
            candidate.request_id,
            outcome,
            judged,
            fit.tokens if runs else 0,
            round(prediction.peak_bytes),
            round(prediction.margin_bytes),
            self._reading.used_bytes,
            self._reading.cap_bytes,
            prediction.regime,
            self._line.waited(candidate.request_id, self._now),
            self.retry_after_s() if judged == "pressure" else 0,
            self.largest_prompt(candidate) if judged == "too_large" else 0,
        )
        self._note(decision)
        return decision

    def observe(self, shape: StepShape, peak_bytes: int, *, at: float) -> None:
        """Learn from a step that was measured, as `PrefillMemory.observe`.

        A step that took more than was predicted with its margin is counted and logged: it ran, and
        the next one like it is judged by it.
        """
        prediction = self.memory.predict(shape)
        if peak_bytes > prediction.needed_bytes:
            self.exceeded += 1
            logger.warning(
                "a step took %d bytes, of which %d and a margin of %d were predicted: %s",
                peak_bytes,
                prediction.peak_bytes,
                prediction.margin_bytes,
                shape,
            )
        self.memory.observe(shape, peak_bytes, at=at)

    def forget(self, request_id: str) -> None:
        """A request has ended, in whatever way."""
        self._line.leave(request_id)
        self._reclaimed.discard(request_id)

    def reclaimed(self) -> None:
        """Memory was given back: what was read before says nothing of the steps to come."""
        self._water.forget()

    def largest_prompt(self, like: Candidate) -> int:
        """Tokens of the largest prompt of a kind that an idle engine can hold, up to `like`'s own.

        0 where none can be held.
        """
        fits, too_large = 0, like.prompt_tokens + 1
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            if self._never_fits(like._replace(wanted=middle, prompt_tokens=middle, computed=0)):
                too_large = middle
            else:
                fits = middle
        return fits

    def report(self) -> GateReport:
        """Settings, calibration and counters, as GET /prefill-gate tells them."""
        return GateReport(
            settings=GateSettings(
                mode=self._settings.prefill_gate,
                cap_bytes=self._settings.prefill_cap_bytes,
                margin_quantile=self._settings.prefill_margin_quantile,
                margin_bytes=self._settings.prefill_margin_bytes,
            ),
            used_bytes=self._reading.used_bytes,
            cap_bytes=self._reading.cap_bytes,
            calibration=self.memory.description(),
            decisions=dict(self.decisions),
            exceeded=self.exceeded,
            waiting=self.waiting,
            longest_wait_s=self.longest_wait_s(),
            deferred_s=self.deferred_s,
        )

    def longest_wait_s(self) -> float:
        """Seconds that the first in line has waited."""
        return self._line.longest(self._now)

    def retry_after_s(self) -> int:
        """When it is worth to try again, from how long others have waited."""
        return min(max(round(self._usual_wait_s), 1), MAX_RETRY_AFTER_S)

    def _judge(self, candidate: Candidate) -> tuple[Outcome, _Fit]:
        """What should become of a prefill, and what of it runs or would have run."""
        whole = self._fit(candidate, candidate.wanted)
        if candidate.exempt:
            return "run", whole
        idle = not self._in_flight and self.planned.tokens == 0
        if idle or self._line.may_pass(candidate.request_id, self._now):
            room = self._reading.headroom_bytes
            if whole.prediction.needed_bytes <= room:
                return "run", whole
            part = self._largest_part(candidate, whole, room)
            if part is not None:
                return "shrink", part
        if idle:
            return self._judge_idle(candidate, whole)
        if candidate.refusable and self._never_fits(candidate):
            return "too_large", whole
        waited = self._line.waited(candidate.request_id, self._now)
        if waited >= PATIENCE_S and self._may_reclaim(candidate):
            return "reclaim", whole
        if waited >= MAX_WAIT_S and candidate.refusable:
            return "pressure", whole
        return "defer", whole

    def _judge_idle(self, candidate: Candidate, whole: _Fit) -> tuple[Outcome, _Fit]:
        """Nothing will come free by waiting."""
        if self._may_reclaim(candidate):
            return "reclaim", whole
        if not self._runs_alone(candidate, self._reading):
            return "too_large", whole
        least = self._fit(candidate, min(candidate.wanted, self._smallest))
        left = self._reading.left_bytes
        if left is not None and left < self.memory.least_bytes(least.shape):
            return "pressure", whole
        return "run" if least.tokens == candidate.wanted else "shrink", least

    def _fit(self, candidate: Candidate, tokens: int) -> _Fit:
        shape = candidate.joined_to(self.planned, tokens)
        return _Fit(tokens, shape, self.memory.predict(shape))

    def _largest_part(self, candidate: Candidate, whole: _Fit, room: float) -> _Fit | None:
        """The most tokens of a prefill that fit into this step, to 3 %; `None` if none do.

        What is needed is lines over the tokens: a try where the line between two tries meets the
        room is mostly right, and one a little above it shows that it is.
        """
        if not candidate.divisible or self._smallest >= candidate.wanted:
            return None
        fits, too_large = self._fit(candidate, self._smallest), whole
        if fits.prediction.needed_bytes > room:
            return None
        while too_large.tokens - fits.tokens > 1 + fits.tokens // 32:
            middle = (fits.tokens + too_large.tokens) // 2
            guess = max(_crossing(fits, too_large, room), fits.tokens + 1)
            for tokens in (guess, guess + 1 + guess // 32, middle):
                if fits.tokens < tokens < too_large.tokens:
                    tried = self._fit(candidate, tokens)
                    if tried.prediction.needed_bytes <= room:
                        fits = tried
                    else:
                        too_large = tried
                        break
        return fits

    def _never_fits(self, candidate: Candidate) -> bool:
        idle = self._water.idle
        if idle is None or self._runs_alone(candidate, idle):
            return False
        needed = self.memory.predict(candidate.joined_to(NOTHING, candidate.wanted)).needed_bytes
        return needed > idle.headroom_bytes

    def _runs_alone(self, candidate: Candidate, reading: Reading) -> bool:
        """Whether an idle engine lets a prefill in without a prediction of its transients."""
        small = candidate.divisible or candidate.wanted <= self._smallest
        return small and candidate.joined_to(NOTHING, 1).held_bytes <= max(
            reading.headroom_bytes, 0
        )

    def _may_reclaim(self, candidate: Candidate) -> bool:
        if self._mode != "enforce" or candidate.request_id in self._reclaimed:
            return False
        last = self._reclaimed_at
        return last is None or self._now - last >= RECLAIM_GAP_S

    def _note(self, decision: Decision) -> None:
        """Count and log it once, and remember who waits and for whom memory was reclaimed."""
        request_id, outcome, waited = decision.request_id, decision.outcome, decision.waited_s
        if decision.judged != "defer" or waited == 0.0:
            self.decisions[decision.judged] += 1
            if decision.judged != "run":
                logger.info("prefill gate, mode %s: %s", self._mode, decision)
        if outcome == "defer":
            self._line.defer(request_id, self._now)
        elif outcome == "reclaim":
            self._reclaimed.add(request_id)
            self._reclaimed_at = self._now
        else:
            if waited:
                self.deferred_s += waited
                self._usual_wait_s += 0.2 * (waited - self._usual_wait_s)
            self._line.leave(request_id)
            if outcome != "shrink":
                self._reclaimed.discard(request_id)


def _crossing(fits: _Fit, too_large: _Fit, room: float) -> int:
    """Tokens at which a line between two fits meets the room."""
    low, high = fits.prediction.needed_bytes, too_large.prediction.needed_bytes
    share = (room - low) / (high - low)
    return fits.tokens + int(share * (too_large.tokens - fits.tokens))
