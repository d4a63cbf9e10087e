"""The gate as an engine's scheduler drives it: figures in, decisions out, and what steps took.

A step is `figures`, `begin`, `decide` for each prefill, and `order` for what the engine then runs,
or none of these where `clearance` takes it. Where each rank has a scheduler of its own, one rank's
figures are handed to all, and every rank makes the same decisions of them.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from engine_plugins.errors import EnginePluginError, UnsupportedError
from engine_plugins.prefill_gate.calibration_file import CalibrationFile, CalibrationKey
from engine_plugins.prefill_gate.clearance import Clearance
from engine_plugins.prefill_gate.decision import Decision
from engine_plugins.prefill_gate.entry import EntryKind, EntryLimits, GateBoard, entry_limits
from engine_plugins.prefill_gate.fitted_line import Sample
from engine_plugins.prefill_gate.gate import PrefillGate
from engine_plugins.prefill_gate.gate_report import GateReport, MeasuredStep
from engine_plugins.prefill_gate.memory_cap import HostFigures, Reading, require_within, resolve_cap
from engine_plugins.prefill_gate.model_memory import ModelMemory, Regime
from engine_plugins.prefill_gate.prefill_memory import PrefillMemory
from engine_plugins.prefill_gate.rank_meter import Measured, Ranks, StepOrder
from engine_plugins.prefill_gate.step_shape import NOTHING, Candidate, StepShape
from engine_plugins.settings import Settings

__all__ = [
    "EngineGate",
    "Keep",
    "Samples",
    "StepFigures",
    "calibration_file",
    "changed",
    "make_engine_gate",
    "no_gate",
    "require_cap",
]

MEASURED_ONE_IN = 16
"""Of steps whose size is known well; measuring takes a tenth of a millisecond."""
SHOWN_STEPS = 64
PUBLISH_S = 1.0
KEEP_S = 30.0
CALIBRATION_LASTS_S = 7 * 86_400.0

_SETTING = {"mode": "gate"}

logger = logging.getLogger(__name__)

Samples = Mapping[Regime, Sequence[Sample]]
Keep = Callable[[Samples], None]
"""Stores measurements for the next start."""


class StepFigures(NamedTuple):
    """All that a decision depends on beside the queue: equal figures give equal decisions.

    Attributes:
        reading: memory in use.
        now: seconds of a clock that does not go back.
        epoch: seconds of the epoch.
        measured: steps whose peaks have become known.
    """

    reading: Reading
    now: float
    epoch: float
    measured: list[Measured]


class EngineGate:
    """One per scheduler.

    Args:
        gate: decides.
        settings: of this server; `configure` changes those of the gate.
        ranks: to measure; a scheduler that is handed figures never asks them.
        largest: see `Clearance`; `None` for a scheduler that is handed figures.
        entry: what the API processes are told about prompts.
        board: where they read it; `None` for all schedulers but one.
        keep: stores measurements now and then; `None` for all schedulers but one.
    """

    def __init__(
        self,
        gate: PrefillGate,
        settings: Settings,
        ranks: Ranks,
        *,
        largest: StepShape | None = None,
        entry: EntryKind,
        board: GateBoard | None = None,
        keep: Keep | None = None,
    ) -> None:
        self.gate = gate
        self._ranks, self._entry, self._board, self._keep = ranks, entry, board, keep
        self.clearance = Clearance(gate.memory, ranks, largest)
        """Asked first: steps that it takes are not begun here."""
        self.is_on = False
        """Whether the scheduler has to ask at all."""
        self._take_settings(settings)
        self._number = 0
        self._awaited: dict[int, StepShape] = {}
        self._recent: deque[MeasuredStep] = deque(maxlen=SHOWN_STEPS)
        self._give_back = self._gave_back = False
        self._published_at = self._kept_at = time.monotonic()
        self._limits: EntryLimits | None = None
        self._publish()

    def figures(self) -> StepFigures:
        """Those of this moment."""
        return StepFigures(
            self._ranks.reading(self._settings.prefill_cap_bytes),
            time.monotonic(),
            time.time(),
            self._ranks.measured(),
        )

    def begin(self, figures: StepFigures, *, running: StepShape = NOTHING, in_flight: bool) -> None:
        """Begin a step; see `PrefillGate.begin`."""
        for number, peak_bytes in figures.measured:
            shape = self._awaited.pop(number, None)
            if shape is not None:
                self._learn(shape, peak_bytes, figures.epoch)
        if self._gave_back:
            self.gate.reclaimed()
            self._gave_back = False
        self.gate.begin(figures.reading, running=running, in_flight=in_flight, now=figures.now)
        if figures.now - self._published_at >= PUBLISH_S:
            self._published_at = figures.now
            self._limits = None
            self._publish()
            self._keep_samples(figures.now)

    def decide(self, candidate: Candidate) -> Decision:
        """Judge one prefill. Of outcome `reclaim` nothing runs now: ask again in the next step."""
        decision = self.gate.decide(candidate)
        if decision.outcome == "reclaim":
            self._give_back = True
        return decision

    def order(self, shape: StepShape, *, rows: int = 0) -> StepOrder:
        """What the ranks are to do about a step that runs.

        Args:
            shape: of the step that the engine has put together, which may be less than was let in.
            rows: as for `Clearance.grant`; 0 clears nothing, and nothing is
                while somebody waits, or those who come are still told so.
        """
        give_back, self._give_back = self._give_back, False
        self._gave_back = self._gave_back or give_back
        self._number += 1
        measure = shape.tokens > 0 and (
            self._number % MEASURED_ONE_IN == 0 or self.gate.memory.is_worth_measuring(shape)
        )
        if measure:
            self._await(shape)
        told_to_wait = self._limits is not None and self._limits.waiting_s > 0
        if rows and not self.gate.waiting and not told_to_wait:
            self.clearance.grant(rows, self.gate.headroom_bytes - shape.held_bytes)
        else:
            self.clearance.withdraw()
        return StepOrder(self._number, measure, give_back)

    def ran_out(self, shape: StepShape) -> None:
        """A step found no memory, though it was let in.

        It is learned as one that took a little more than was predicted. What was free says less:
        whoever took that may have been another process.
        """
        needed = self.gate.memory.predict(shape).needed_bytes
        self._learn(shape, round(needed) + 1, time.time())
        self.clearance.withdraw()

    def forget(self, request_ids: Sequence[str], *, idle: bool) -> None:
        """Requests have ended; `idle` says whether none is left."""
        for request_id in request_ids:
            self.gate.forget(request_id)
        if idle:
            if self._limits is not None and self._limits.waiting_s:
                self._limits = None
            self._publish()

    @property
    def calls(self) -> dict[str, Callable[..., Any]]:
        """What the admin routes ask for, by name."""
        return {
            "gate_report": self.report,
            "gate_configure": self.configure,
            "gate_reset": self.reset,
        }

    def report(self) -> GateReport:
        """The gate as it is."""
        return msgspec.structs.replace(
            self.gate.report(), cleared_steps=self.clearance.steps, recent=list(self._recent)
        )

    def configure(self, changes: dict[str, Any]) -> GateReport:
        """Change settings of the gate, by their names in `GateSettings`, until the server ends.

        Raises:
            SettingsError: a value that makes no sense here; nothing has changed.
        """
        settings = changed(self._settings, changes)
        require_cap(settings, self._ranks.device_bytes())
        self.gate.configure(settings)
        self._take_settings(settings)
        self._limits = None
        self._published_at = -math.inf  # the next step tells what holds with its memory in use
        self._publish()
        return self.report()

    def reset(self) -> GateReport:
        """Forget measurements, kept ones too, who waits, and counters."""
        self.gate.reset()
        self.clearance.reset()
        self._awaited.clear()
        self._recent.clear()
        self._store({})
        self._limits = None
        self._publish()
        return self.report()

    def _take_settings(self, settings: Settings) -> None:
        self._settings, self.is_on = settings, self.gate.is_on
        self.clearance.configure(settings.prefill_cap_bytes)

    def _await(self, shape: StepShape) -> None:
        """The peaks of the latest steps only: a rank that lost one never names it."""
        self._awaited[self._number] = shape
        if len(self._awaited) > SHOWN_STEPS:
            del self._awaited[next(iter(self._awaited))]

    def _learn(self, shape: StepShape, peak_bytes: int, epoch: float) -> None:
        prediction = self.gate.memory.predict(shape)
        self._recent.append(
            MeasuredStep(
                tokens=shape.tokens,
                prompt_logprob_rows=shape.prompt_logprob_rows,
                regime=prediction.regime,
                predicted_bytes=round(prediction.peak_bytes),
                margin_bytes=round(prediction.margin_bytes),
                measured_bytes=peak_bytes,
            )
        )
        self.gate.observe(shape, peak_bytes, at=epoch)

    def _keep_samples(self, now: float) -> None:
        if now - self._kept_at >= KEEP_S:
            self._kept_at = now
            self._store(self.gate.memory.samples)

    def _store(self, samples: Samples) -> None:
        """A folder that cannot be written costs the next start its calibration, nothing else."""
        if self._keep is None:
            return
        try:
            self._keep(samples)
        except OSError as error:
            logger.warning("measurements of prefills are not kept for the next start: %s", error)

    def _publish(self) -> None:
        if self._board is None:
            return
        if self._limits is None:
            self._limits = entry_limits(self.gate, self._entry)
        self._board.publish(self._limits, self.report())


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Settings with those of the gate changed, by their names in `GateSettings`.

    Raises:
        SettingsError: a value that makes no sense anywhere.
    """
    return replace(
        settings, **{f"prefill_{_SETTING.get(name, name)}": changes[name] for name in changes}
    )


def make_engine_gate(
    model: ModelMemory,
    settings: Settings,
    ranks: Ranks,
    *,
    smallest_chunk: int,
    largest: StepShape | None,
    entry: EntryKind,
    samples: Samples,
    board: GateBoard | None,
    keep: Keep | None,
) -> EngineGate:
    """The gate of a scheduler, with the measurements of earlier processes.

    Raises:
        SettingsError: a cap that this machine cannot hold.
    """
    require_cap(settings, ranks.device_bytes())
    memory = PrefillMemory(
        model,
        margin_quantile=settings.prefill_margin_quantile,
        margin_bytes=settings.prefill_margin_bytes,
        expire_s=CALIBRATION_LASTS_S,
    )
    memory.restore(samples, now=time.time())
    gate = PrefillGate(memory, settings, smallest_chunk=smallest_chunk)
    return EngineGate(gate, settings, ranks, largest=largest, entry=entry, board=board, keep=keep)


def calibration_file(settings: Settings, key: CalibrationKey) -> CalibrationFile:
    """Where measurements wait for the next start of the same engine.

    Raises:
        UnsupportedError: no folder is configured, and this user has none.
    """
    folder = settings.prefill_calibration_dir or _cache_folder() / "engine_plugins"
    return CalibrationFile(folder, key, expire_s=CALIBRATION_LASTS_S)


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(cache) if cache else Path.home() / ".cache"
    except RuntimeError as error:  # no HOME, and a user id that no table knows
        raise UnsupportedError(
            f"the prefill gate has no folder for its measurements: {error}",
            remedy="set ENGINE_PLUGINS_PREFILL_CALIBRATION_DIR, or HOME",
        ) from error


def no_gate(error: Exception) -> EnginePluginError:
    """Why an engine whose gate is off serves without one: the answer to every call of it."""
    if isinstance(error, EnginePluginError):
        return error
    logger.warning("this engine has no prefill gate", exc_info=error)
    return UnsupportedError(
        f"this engine has no prefill gate: {type(error).__name__}: {error}",
        remedy="see the server's log",
    )


def require_cap(settings: Settings, device_bytes: int | None = None) -> None:
    """Refuse a cap that the GPU, or without one this machine or process, cannot hold.

    Raises:
        SettingsError: the text says which limit.
    """
    cap = settings.prefill_cap_bytes
    if device_bytes is None:
        resolve_cap(cap, HostFigures.now())
    else:
        require_within(cap, device_bytes, "the GPU's memory")
