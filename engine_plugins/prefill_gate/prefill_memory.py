"""What a step will take at its peak: the model's prior, corrected by what steps took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from engine_plugins.prefill_gate.fitted_line import PRIOR_INTERCEPT_BYTES, FittedLine, Sample
from engine_plugins.prefill_gate.gate_report import LineReport
from engine_plugins.prefill_gate.model_memory import REGIMES, ModelMemory, Regime
from engine_plugins.prefill_gate.step_shape import StepShape

__all__ = ["Prediction", "PrefillMemory"]

UNPROVEN_SHARE = 1.0
"""The margin's least share of what a phase takes beyond the sizes that its line is believed for."""
TELLING_HELD_BYTES = 1 << 20
"""A step that keeps more says nothing of its transients: memory is counted when it is touched."""


class Prediction(NamedTuple):
    """Bytes that a step takes beyond what is in use before it.

    `peak_bytes` includes what the step keeps; `margin_bytes` comes on top. `is_proven` says whether
    measurements reach as far as the phase that asks for most.
    """

    peak_bytes: float
    margin_bytes: float
    regime: Regime
    is_proven: bool

    @property
    def needed_bytes(self) -> float:
        """What must be free for the step to be let in."""
        return self.peak_bytes + self.margin_bytes


class _Drawn(NamedTuple):
    """What predictions need of a line."""

    intercept: float
    slope: float
    proven_up_to: float
    margin: float
    regime: Regime


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
        self.drawn = 0
        """How often the lines were drawn: as long as it is the same, so are predictions."""
        self.configure(margin_quantile=margin_quantile, margin_bytes=margin_bytes)

    def configure(self, *, margin_quantile: float, margin_bytes: int) -> None:
        """Change the margin; the measurements stay."""
        self._quantile, self._floor = margin_quantile, margin_bytes
        self._draw_all()

    def predict(self, shape: StepShape) -> Prediction:
        """The peak of a step, and the margin with which every phase of it fits.

        A phase that little is known of may need more than the one that is expected to be the peak.
        """
        peak, needed, regime, is_proven = 0.0, 0.0, REGIMES[0], False
        for line, expected in zip(self._drawn, self.model.phases(shape), strict=True):
            if not expected:
                continue
            intercept, slope, proven_up_to, margin, of_line = line
            measured = intercept + slope * expected
            if expected > proven_up_to:
                margin = max(margin, UNPROVEN_SHARE * slope * (expected - proven_up_to))
            if measured + margin > needed:
                needed, is_proven = measured + margin, expected <= proven_up_to
            if measured >= peak:
                peak, regime = measured, of_line
        return Prediction(peak + shape.held_bytes, needed - peak, regime, is_proven)

    def least_bytes(self, shape: StepShape) -> int:
        """What a step takes by the model's sizes alone, whatever was measured."""
        return max(self.model.phases(shape))

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
        place, expected = self._largest(shape)
        if expected and self._lines[place].add(Sample(expected, peak_bytes - shape.held_bytes, at)):
            self._draw_all()

    def is_worth_measuring(self, shape: StepShape) -> bool:
        """Whether little is known of steps of this size; of others one in a few will do."""
        place, expected = self._largest(shape)
        return self._lines[place].lacks(expected)

    @property
    def samples(self) -> dict[Regime, list[Sample]]:
        """What was measured, by the phase that it is thought to come from."""
        return {name: line.samples for name, line in zip(REGIMES, self._lines, strict=True)}

    def restore(self, samples: Mapping[Regime, Sequence[Sample]], *, now: float) -> None:
        """Begin with measurements of an earlier process."""
        for line, name in zip(self._lines, REGIMES, strict=True):
            line.restore(samples.get(name, ()), now)
        self._draw_all()

    def reset(self) -> None:
        """Forget all measurements: the prior speaks again."""
        for line in self._lines:
            line.reset()
        self._draw_all()

    def description(self) -> dict[Regime, LineReport]:
        """Each phase's line, for an operator."""
        return {
            name: LineReport(
                samples=len(line.samples),
                intercept_bytes=round(drawn.intercept),
                slope=round(line.slope, 4),
                proven=line.proven_up_to > 0,
                error_p95=round(line.relative_error(0.95), 4),
                margin_bytes=round(drawn.margin),
            )
            for name, line, drawn in zip(REGIMES, self._lines, self._drawn, strict=True)
        }

    def _largest(self, shape: StepShape) -> tuple[int, int]:
        """The phase that a step's peak is thought to come from, and what it should take.

        By the prior: lines that chose their own samples would go on choosing the wrong ones.
        """
        phases = self.model.phases(shape)
        place = max(range(len(phases)), key=phases.__getitem__)
        return place, phases[place]

    def _draw_all(self) -> None:
        """Take the lines over; those without samples get what others show to be fixed in a step."""
        self.drawn += 1
        measured = [line.intercept for line in self._lines if line.samples]
        fixed = max([*measured, 0.0]) if measured else float(PRIOR_INTERCEPT_BYTES)
        self._drawn = [
            _Drawn(
                line.intercept if line.samples else fixed,
                line.slope,
                line.proven_up_to,
                max(line.error_quantile(self._quantile), float(self._floor)),
                regime,
            )
            for regime, line in zip(REGIMES, self._lines, strict=True)
        ]
