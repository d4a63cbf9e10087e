"""Bodies and answers of the admin routes: the single source of the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from engine_plugins.admin.engine_control import InFlightKV, PauseMode
from engine_plugins.admin.state import StateName
from engine_plugins.prefill_gate.decision import Outcome
from engine_plugins.prefill_gate.model_memory import Regime
from engine_plugins.settings import GATE_MODES
from engine_plugins.sleep.memory_backend import MemoryTag

__all__ = [
    "AbortBody",
    "CommitBody",
    "ConnectBody",
    "EngineView",
    "FenceView",
    "FlushBody",
    "Flushed",
    "GateBody",
    "GateView",
    "PauseBody",
    "ProgressView",
    "RequestsView",
    "SleepAnswer",
    "SleepBody",
    "SourceAccepted",
    "StateView",
    "UpdateBody",
    "WakeBody",
    "WeightsView",
    "WorkerView",
]


_EXACT = 1 << 53
"""Below it every number of JSON is exact, wherever it is read."""
_Bytes = Annotated[int, Field(strict=True, gt=-_EXACT, lt=_EXACT)]


class _Body(BaseModel):
    """A body in which an unknown field is an error, not a silent default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class PauseBody(_Body):
    """How to pause."""

    mode: PauseMode = "keep"
    timeout_s: float = Field(default=30.0, gt=0)
    hold_s: float | None = Field(
        default=None, gt=0, description="resume by itself after so many seconds"
    )


class FlushBody(_Body):
    """Which caches to empty."""

    prefix_cache: bool = True
    multimodal_cache: bool = True


class ConnectBody(_Body):
    """Which sources to plan an update from."""

    source_ids: list[str] = Field(min_length=1, max_length=65536)
    direction: Literal["pull", "push"] = "pull"
    model: dict[str, str | int | bool] = Field(
        default_factory=dict, description="facts of the trainer's HF config, compared with ours"
    )


class UpdateBody(_Body):
    """Which weights to install, and how."""

    plan_id: str
    version: int = Field(ge=0, lt=1 << 53)
    request_id: str = Field(default_factory=lambda: uuid4().hex, min_length=1, max_length=256)
    mode: Literal["auto", "staged", "in_place"] = "auto"
    verify: Literal["none", "sample", "full"] = "none"
    pause: PauseMode = "keep"
    in_flight_kv: InFlightKV = "recompute"
    flush: bool = True
    resume: bool | None = Field(
        default=None,
        description="null: serve again, unless a caller had paused the engine before; true: "
        "always; false: stay paused",
    )
    timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="of prepare: until the commit, which then has as much again",
    )
    force: bool = Field(default=False, description="install a version that is not newer")
    source_word: int | None = Field(
        default=None,
        ge=1,
        lt=1 << 53,
        description="what the version words of all sources hold for this update; null: what they "
        "hold when it begins. One that differs then or later means that the offer was taken back",
    )


class CommitBody(_Body):
    """Which prepared update to install."""

    request_id: str = Field(min_length=1, max_length=256)


class AbortBody(CommitBody):
    """Which prepared update to give up."""

    writes_ended: bool = Field(
        default=False,
        description="of a push: no write of the trainer is under way, so its targets can be used "
        "again",
    )


class SleepBody(_Body):
    """How deep to sleep, and what to release."""

    level: Literal[1, 2] = Field(
        default=1, description="1: weights come back at wake; 2: an update has to bring new ones"
    )
    tags: list[MemoryTag] | None = Field(
        default=None, min_length=1, description="null: everything that the engine can release"
    )
    pause: PauseMode = Field(
        default="keep", description="what becomes of requests: held ones recompute their KV"
    )
    timeout_s: float = Field(default=30.0, gt=0, description="of the pause")


class WakeBody(_Body):
    """What to map again."""

    tags: list[MemoryTag] | None = Field(
        default=None, min_length=1, description="null: everything that is released"
    )


class GateBody(_Body):
    """What to change of the prefill gate until the server ends; what is left out stays.

    The types are checked here, the values where the server's own settings are.
    """

    mode: str = Field(
        default_factory=str, max_length=64, json_schema_extra={"enum": list(GATE_MODES)}
    )
    cap_bytes: _Bytes | None = Field(
        default_factory=lambda: None, description="of a rank; null: what is free"
    )
    margin_quantile: float = Field(
        default_factory=float, strict=True, description="of prediction errors; over 0, at most 1"
    )
    margin_bytes: _Bytes = Field(
        default_factory=int, description="what the margin never falls below"
    )


class SourceAccepted(BaseModel):
    """A manifest that this server now holds."""

    source_id: str


class Flushed(BaseModel):
    """The caches that were emptied."""

    flushed: list[str]


class WorkerView(BaseModel):
    """One worker process of the engine."""

    tp_rank: int
    pid: int
    host: str


class EngineView(BaseModel):
    """What the engine is."""

    kind: str
    version: str
    plugin_version: str
    model: str
    tensor_parallel_size: int
    pipeline_parallel_size: int


class PauseView(BaseModel):
    """A pause that a caller asked for."""

    mode: PauseMode
    until: float | None


class InstalledView(BaseModel):
    """The weights that serve; version null for those the engine was started with."""

    version: int | None
    request_id: str | None
    installed_at: float | None
    digest: str | None


class FenceView(BaseModel):
    """Why the engine refuses to serve, and the way out."""

    code: str
    detail: str
    remedy: str


class ProgressView(BaseModel):
    """The update under way."""

    request_id: str
    version: int
    phase: str
    bytes_done: int
    bytes_total: int


class SleepView(BaseModel):
    """A sleep that has not ended."""

    level: int
    released: list[MemoryTag]
    since: float
    resume: bool
    weights_lost: bool
    verdict: str | None
    reason: str | None


class RequestsView(BaseModel):
    """Requests in the engine; null where it is too busy to say at once."""

    running: int | None
    waiting: int | None


class AbsentView(BaseModel):
    """An optional part of ours that this server has to do without."""

    part: str
    reason: str


class StateView(BaseModel):
    """The engine as it is now."""

    engine: EngineView
    state: StateName
    since: float
    pause: PauseView | None
    weights: InstalledView
    sleep: SleepView | None = None
    fence: FenceView | None
    update: ProgressView | None
    requests: RequestsView
    workers: list[WorkerView]
    absent: list[AbsentView] = []


class SleepAnswer(StateView):
    """The engine asleep, and what is still resident of it."""

    memory: dict[str, object] = Field(description="as GET /memory")


class WeightsView(BaseModel):
    """The version that serves, and how it came to be."""

    version: int | None
    history: list[dict[str, object]] = Field(description="reports, newest first")
    plans: list[dict[str, object]]


class GateSettingsView(BaseModel):
    """What is in force of the prefill gate."""

    mode: str
    cap_bytes: int | None
    margin_quantile: float
    margin_bytes: int


class LineView(BaseModel):
    """What is known of one phase of a step."""

    samples: int
    intercept_bytes: int
    slope: float
    proven: bool
    error_p95: float
    margin_bytes: int


class MeasuredStepView(BaseModel):
    """A step that was measured, beside what was predicted for it."""

    tokens: int
    prompt_logprob_rows: int
    regime: Regime
    predicted_bytes: int
    margin_bytes: int
    measured_bytes: int


class GateView(BaseModel):
    """The prefill gate as of the engine's latest step; bytes are of the rank with least room."""

    settings: GateSettingsView
    used_bytes: int
    cap_bytes: int
    calibration: dict[Regime, LineView] = Field(description="by phase of a step")
    decisions: dict[Outcome, int] = Field(description="how many of each; a wait counts once")
    exceeded: int = Field(description="measured steps that took more than predicted with margin")
    waiting: int
    longest_wait_s: float
    deferred_s: float = Field(description="that requests which were let in had waited, in all")
    cleared_steps: int = Field(
        description="that ran without a decision: the largest such step would have fitted twice"
    )
    recent: list[MeasuredStepView] = Field(description="measured lately, oldest first")
