"""What a step will take at its peak: the model's prior, corrected by what steps took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from engine_plugins.prefill_gate.fitted_line import FittedLine, Sample
from engine_plugins.prefill_gate.model_memory import REGIMES, ModelMemory, Regime
from engine_plugins.prefill_gate.step_shape import StepShape

__all__ = ["Prediction", "PrefillMemory"]

UNPROVEN_SHARE = 1.0
"""The margin's least share of a prediction that only the prior speaks for: twice is taken."""
TELLING_HELD_BYTES = 1 << 20
"""A step that keeps more says nothing of its transients: memory is counted when it is touched."""


class Prediction(NamedTuple):
    """Bytes that a step takes beyond what is in use before it.

    `peak_bytes` includes what the step keeps; `margin_bytes` comes on top.
    """

    peak_bytes: float
    margin_bytes: float
    regime: Regime

    @property
    def needed_bytes(self) -> float:
        """What must be free for the step to be let in."""
        return self.peak_bytes + self.margin_bytes


class PrefillMemory:
    """The predictor of one engine rank.

    Args:
        model: the prior.
        margin_quantile: of (measured - predicted), which the margin covers.
        margin_bytes: what the margin never falls below.
        expire_s: after which a measurement says nothing any more.
    """

    def __init__(
        self,
        model: ModelMemory,
        *,
        margin_quantile: float,
        margin_bytes: int,
        expire_s: float = math.inf,
    ) -> None:
        self.model = model
        self._lines = tuple(FittedLine(expire_s=expire_s) for _ in REGIMES)
        self._drawn = [_drawn(line) for line in self._lines]
        """Intercept, slope and reach of each line, at hand for every prediction."""
        self._margins = [0.0] * len(REGIMES)
        self.configure(margin_quantile=margin_quantile, margin_bytes=margin_bytes)

    def configure(self, *, margin_quantile: float, margin_bytes: int) -> None:
        """Change the margin; the measurements stay."""
        self._quantile, self._floor = margin_quantile, margin_bytes
        for place in range(len(REGIMES)):
            self._take_over(place)

    def predict(self, shape: StepShape) -> Prediction:
        """The peak of a step, and the margin that its largest phase needs."""
        peak, largest, of_largest = 0.0, 0, 0
        for place, expected in enumerate(self.model.phases(shape)):
            if expected:
                intercept, slope, _ = self._drawn[place]
                measured = intercept + slope * expected
                if measured >= peak:
                    peak, largest, of_largest = measured, place, expected
        margin = self._margins[largest]
        if of_largest > self._drawn[largest][2]:
            margin = max(margin, UNPROVEN_SHARE * peak)
        return Prediction(peak + shape.held_bytes, margin, REGIMES[largest])

    def observe(self, shape: StepShape, peak_bytes: float, *, at: float) -> None:
        """Learn from a step that took `peak_bytes` at its peak, what it keeps included.

        The first step of each size, and steps that keep much, are left out.

        Args:
            shape: of the step that was measured.
            peak_bytes: its peak over what was in use before it.
            at: seconds of the epoch.
        """
        if shape.held_bytes > TELLING_HELD_BYTES:
            return
        phases = self.model.phases(shape)
        place = max(range(len(phases)), key=phases.__getitem__)
        sample = Sample(phases[place], peak_bytes - shape.held_bytes, at)
        if phases[place] and self._lines[place].add(sample):
            self._take_over(place)

    @property
    def samples(self) -> dict[Regime, list[Sample]]:
        """What was measured, by the phase that it is thought to come from."""
        return {name: line.samples for name, line in zip(REGIMES, self._lines, strict=True)}

    def restore(self, samples: Mapping[Regime, Sequence[Sample]], *, now: float) -> None:
        """Begin with measurements of an earlier process."""
        for place, name in enumerate(REGIMES):
            self._lines[place].restore(samples.get(name, ()), now)
            self._take_over(place)

    def reset(self) -> None:
        """Forget all measurements: the prior speaks again."""
        for place, line in enumerate(self._lines):
            line.reset()
            self._take_over(place)

    def description(self) -> dict[Regime, dict[str, float | int | bool]]:
        """Each phase's line, as an answer to an operator."""
        return {
            name: {
                "samples": len(line.samples),
                "intercept_bytes": round(line.intercept),
                "slope": round(line.slope, 4),
                "proven": line.proven_up_to > 0,
                "margin_bytes": round(self._margins[place]),
            }
            for place, (name, line) in enumerate(zip(REGIMES, self._lines, strict=True))
        }

    def _take_over(self, place: int) -> None:
        self._drawn[place] = _drawn(self._lines[place])
        error = self._lines[place].error_quantile(self._quantile)
        self._margins[place] = max(error, float(self._floor))


def _drawn(line: FittedLine) -> tuple[float, float, float]:
    return line.intercept, line.slope, line.proven_up_to
