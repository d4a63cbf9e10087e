"""The gate as plain data, for whoever watches it."""

from __future__ import annotations

from typing import TypedDict

import msgspec

from engine_plugins.prefill_gate.decision import Outcome
from engine_plugins.prefill_gate.model_memory import Regime

__all__ = ["GateChanges", "GateReport", "GateSettings", "LineReport", "MeasuredStep"]


class LineReport(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one phase of a step.

    Attributes:
        samples: steps that the line is drawn from.
        intercept_bytes: of the line.
        slope: measured bytes per byte of the prior.
        proven: whether measurements speak, and not the prior.
        error_p95: of the samples, the distance from the line over what was measured.
        margin_bytes: on top of a prediction.
    """

    samples: int
    intercept_bytes: int
    slope: float
    proven: bool
    error_p95: float
    margin_bytes: int


class GateSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is in force.

    Attributes:
        mode: off, observe or enforce.
        cap_bytes: as configured; `None` where it is what is free.
        margin_quantile: of prediction errors, which the margin covers.
        margin_bytes: what the margin never falls below.
    """

    mode: str
    cap_bytes: int | None
    margin_quantile: float
    margin_bytes: int


class GateChanges(TypedDict, total=False):
    """Fields of `GateSettings` to change."""

    mode: str
    cap_bytes: int | None
    margin_quantile: float
    margin_bytes: int


class MeasuredStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step that was measured, beside what was predicted for it just before that was learned."""

    tokens: int
    prompt_logprob_rows: int
    regime: Regime
    predicted_bytes: int
    margin_bytes: int
    measured_bytes: int


class GateReport(msgspec.Struct, frozen=True, kw_only=True):
    """The gate of one engine rank, as of its latest step.

    Attributes:
        settings: in force.
        used_bytes: in use when the step began.
        cap_bytes: what must not be exceeded.
        calibration: by phase of a step.
        decisions: how many of each outcome; a request that is deferred is counted once for it.
        exceeded: measured steps that took more than was predicted with its margin.
        waiting: requests that are deferred.
        longest_wait_s: of them, seconds.
        deferred_s: seconds that requests which were let in had waited, in all.
        cleared_steps: that ran without a decision, because the largest of their kind would have
            fitted twice.
        recent: the latest steps that were measured, oldest first.
    """

    settings: GateSettings
    used_bytes: int
    cap_bytes: int
    calibration: dict[Regime, LineReport]
    decisions: dict[Outcome, int]
    exceeded: int
    waiting: int
    longest_wait_s: float
    deferred_s: float
    cleared_steps: int = 0
    recent: list[MeasuredStep] = []
