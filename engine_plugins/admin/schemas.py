"""Answers of the admin routes; with their bodies, the source of the OpenAPI document."""

from __future__ import annotations

from typing import Annotated

import msgspec
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from engine_plugins.admin.bodies import (
    AbortBody,
    CommitBody,
    ConnectBody,
    FlushBody,
    GateBody,
    PauseBody,
    SleepBody,
    UpdateBody,
    WakeBody,
)
from engine_plugins.admin.engine_control import PauseMode
from engine_plugins.admin.state import StateName
from engine_plugins.prefill_gate.decision import Outcome
from engine_plugins.prefill_gate.model_memory import Regime
from engine_plugins.sleep.leak_watch import LeakTrend
from engine_plugins.sleep.memory_backend import MemoryTag
from engine_plugins.sleep.memory_report import ResidualReport
from engine_plugins.weights.contract.report import PlanSummary, UpdateReport

__all__ = [
    "STRUCT",
    "AbortBody",
    "CommitBody",
    "ConnectBody",
    "EngineView",
    "FenceView",
    "FlushBody",
    "Flushed",
    "GateBody",
    "GateView",
    "MemoryReport",
    "PauseBody",
    "Problem",
    "ProgressView",
    "RequestsView",
    "SleepAnswer",
    "SleepBody",
    "SourceAccepted",
    "SourcesAccepted",
    "StateView",
    "UpdateBody",
    "WakeBody",
    "WeightsView",
    "WorkerView",
]


STRUCT = "x-struct"
"""In a schema, for the one of the struct of this name."""

Plain = dict[str, object]


def _struct(kind: type[msgspec.Struct], *, many: bool = False) -> WithJsonSchema:
    """The schema of plain data that was encoded from a struct; see `document.py`."""
    one = {STRUCT: kind.__name__}
    return WithJsonSchema({"type": "array", "items": one} if many else one)


class _Answer(BaseModel):
    """An answer, whose fields are told by the lines below them."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class MemoryReport(ResidualReport, frozen=True, kw_only=True):
    """What is resident of an engine, and whether it grows from sleep to sleep."""

    leaks: list[LeakTrend]


class SourceAccepted(_Answer):
    """A manifest that this server now holds."""

    source_id: str
    """Of the manifest's content: the same manifest has the same."""


class SourcesAccepted(_Answer):
    """Manifests that this server now holds."""

    source_ids: list[str]
    """Of the manifests, in the order in which they came."""


class Flushed(_Answer):
    """The caches that were emptied."""

    flushed: list[str]
    """Their names."""


class WorkerView(_Answer):
    """One worker process of the engine."""

    tp_rank: int
    pid: int
    """As its host counts processes."""
    host: str


class EngineView(_Answer):
    """What the engine is."""

    kind: str
    """vllm or sglang."""
    version: str
    """The engine's own."""
    plugin_version: str
    model: str
    """As the server was started with it."""
    tensor_parallel_size: int
    pipeline_parallel_size: int


class PauseView(_Answer):
    """A pause that a caller asked for."""

    mode: PauseMode
    until: float | None
    """Unix seconds at which it ends by itself; null: it does not."""


class InstalledView(_Answer):
    """The weights that serve; version null for those the engine was started with."""

    version: int | None
    request_id: str | None
    """Of the update that installed them."""
    installed_at: float | None
    """Unix seconds."""
    digest: str | None


class FenceView(_Answer):
    """Why the engine refuses to serve, and the way out."""

    code: str
    """Of the failure that led here."""
    detail: str
    """What was seen."""
    remedy: str
    """The way out."""


class ProgressView(_Answer):
    """The update under way."""

    request_id: str
    version: int
    phase: str
    """prepare, pull, prepared, install or the like."""
    bytes_done: int
    bytes_total: int


class SleepView(_Answer):
    """A sleep that has not ended."""

    level: int
    """1: weights come back at wake; 2: an update has to bring new ones."""
    released: list[MemoryTag]
    """What is out of memory now."""
    since: float
    """Unix seconds."""
    resume: bool
    """Whether the engine serves again once it is awake."""
    weights_lost: bool
    """The weights hold nothing of use until an update completes."""
    verdict: str | None
    """Of the check for memory that is still resident; null while it is under way."""
    reason: str | None


class RequestsView(_Answer):
    """Requests in the engine; null where it is too busy to say at once."""

    running: int | None
    waiting: int | None


class AbsentView(_Answer):
    """An optional part of ours that this server has to do without."""

    part: str
    reason: str


class StateView(_Answer):
    """The engine as it is now."""

    engine: EngineView
    state: StateName
    since: float
    """Unix seconds."""
    pause: PauseView | None
    weights: InstalledView
    sleep: SleepView | None = None
    fence: FenceView | None
    update: ProgressView | None
    requests: RequestsView
    workers: list[WorkerView]
    """Empty while they cannot be asked."""
    absent: list[AbsentView] = []
    """Optional parts of ours that this server does without."""


class SleepAnswer(StateView):
    """The engine asleep, and what is still resident of it."""

    memory: Annotated[Plain, _struct(MemoryReport)]
    """As GET /memory."""


class WeightsView(_Answer):
    """The version that serves, and how it came to be."""

    version: int | None
    history: Annotated[list[Plain], _struct(UpdateReport, many=True)]
    """Newest first."""
    plans: Annotated[list[Plain], _struct(PlanSummary, many=True)]
    """Oldest first."""


class GateSettingsView(_Answer):
    """What is in force of the prefill gate."""

    mode: str
    cap_bytes: int | None
    margin_quantile: float
    margin_bytes: int


class LineView(_Answer):
    """What is known of one phase of a step."""

    samples: int
    intercept_bytes: int
    slope: float
    proven: bool
    error_p95: float
    margin_bytes: int


class MeasuredStepView(_Answer):
    """A step that was measured, beside what was predicted for it."""

    tokens: int
    prompt_logprob_rows: int
    regime: Regime
    predicted_bytes: int
    margin_bytes: int
    measured_bytes: int


class GateView(_Answer):
    """The prefill gate as of the engine's latest step; bytes are of the rank with least room."""

    settings: GateSettingsView
    used_bytes: int
    cap_bytes: int
    calibration: dict[Regime, LineView]
    """By phase of a step."""
    decisions: dict[Outcome, int]
    """How many of each; a wait counts once."""
    exceeded: int
    """Measured steps that took more than predicted with margin."""
    waiting: int
    """Requests that are deferred now."""
    longest_wait_s: float
    """Of those."""
    deferred_s: float
    """Seconds that requests which were let in had waited, in all."""
    cleared_steps: int
    """Steps that ran without a decision: the largest such step would have fitted twice."""
    recent: list[MeasuredStepView]
    """Measured lately, oldest first."""


class Problem(_Answer):
    """Why a request was not done (RFC 9457), and what to do."""

    type: str
    """`urn:engine-plugins:` and the code."""
    title: str
    """The status in words."""
    status: int
    detail: str
    """What was seen."""
    code: str
    """Stable, in snake_case: what programs go by."""
    state: StateName | None
    """The engine's; null where it is not known, or the caller is not."""
    remedy: str
    """What the caller can do; empty where nothing helps."""
    memory: Annotated[Plain, _struct(MemoryReport)] = Field(default_factory=dict)
    """Of 507 residual_memory alone: who holds what."""
