"""Bodies that the admin routes take. A bound in the document is one that is enforced."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from engine_plugins.admin.engine_control import InFlightKV, PauseMode
from engine_plugins.admin.sources import MAX_SOURCES
from engine_plugins.settings import GATE_MODES
from engine_plugins.sleep.memory_backend import MemoryTag

__all__ = [
    "AbortBody",
    "CommitBody",
    "ConnectBody",
    "FlushBody",
    "GateBody",
    "PauseBody",
    "SleepBody",
    "UpdateBody",
    "WakeBody",
]

_EXACT = 1 << 53
"""Below it every number of JSON is exact, wherever it is read."""
_DAY_S = 86_400.0
_MAX_ID = 256

Seconds = Annotated[float, Field(gt=0, le=_DAY_S)]
Version = Annotated[int, Field(ge=0, lt=_EXACT)]
RequestId = Annotated[str, Field(min_length=1, max_length=_MAX_ID)]
Id = Annotated[str, Field(max_length=_MAX_ID)]

# Of the gate, the document has the bounds, and the server's own settings enforce them (422).
_Exact = Field(strict=True, gt=-_EXACT, lt=_EXACT)
_CapBytes = Annotated[
    int, _Exact, WithJsonSchema({"type": "integer", "minimum": 1, "exclusiveMaximum": _EXACT})
]
_MarginBytes = Annotated[
    int, _Exact, WithJsonSchema({"type": "integer", "minimum": 0, "exclusiveMaximum": _EXACT})
]
_Quantile = Annotated[
    float, WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 1})
]
_Mode = Annotated[
    str, Field(max_length=64), WithJsonSchema({"type": "string", "enum": list(GATE_MODES)})
]


class _Body(BaseModel):
    """A body in which an unknown field or a wrong type is an error, not a silent default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _example(body: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [body]})


class PauseBody(_Body):
    """How to pause."""

    model_config = _example({"mode": "keep", "timeout_s": 30.0, "hold_s": None})

    mode: PauseMode = Field(
        default="keep",
        description="keep: requests stay where they are; wait: they finish; abort: they end",
    )
    timeout_s: Seconds = Field(default=30.0, description="until the scheduler stands still")
    hold_s: Seconds | None = Field(
        default=None, description="resume by itself after so many seconds; null: do not"
    )


class FlushBody(_Body):
    """Which caches to empty."""

    model_config = _example({"prefix_cache": True, "multimodal_cache": False})

    prefix_cache: bool = Field(default=True, description="KV that prompts share")
    multimodal_cache: bool = Field(default=True, description="encoded images, sound and video")


class ConnectBody(_Body):
    """Which sources to plan an update from."""

    model_config = _example(
        {"source_ids": ["source-0123456789abcdef01234567"], "direction": "pull"}
    )

    source_ids: list[Id] = Field(
        min_length=1, max_length=MAX_SOURCES, description="as POST /weights/sources gave them"
    )
    direction: Literal["pull", "push"] = Field(
        default="pull", description="pull: the engine reads the weights; push: trainers write them"
    )
    model: dict[str, str | int | bool] = Field(
        default_factory=dict, description="facts of the trainer's HF config, compared with ours"
    )
    tell_dtypes: bool = Field(
        default=False,
        description="answer in `wanted` which tensors must come in another dtype, and make no "
        "plan then; false: refuse such tensors",
    )


class UpdateBody(_Body):
    """Which weights to install, and how."""

    model_config = _example(
        {"plan_id": "plan-0123456789abcdef", "version": 7, "request_id": "step-7"}
    )

    plan_id: Id = Field(description="as POST /weights/connect gave it")
    version: Version = Field(description="of the weights; greater than the installed one")
    request_id: RequestId = Field(
        default_factory=lambda: uuid4().hex,
        description="names this update: sent again, it gets the first answer again",
    )
    mode: Literal["auto", "staged", "in_place"] = Field(
        default="auto",
        description="staged: the old weights serve until all bytes are here; in_place: module by "
        "module while paused; auto: staged where that fits in memory that is surely free",
    )
    verify: Literal["none", "sample", "full"] = Field(
        default="none", description="what is compared with the source after the install"
    )
    pause: PauseMode = Field(default="keep", description="what becomes of requests meanwhile")
    in_flight_kv: InFlightKV = Field(
        default="recompute",
        description="held requests rebuild their KV with the new weights, or keep it",
    )
    flush: bool = Field(default=True, description="whether prefix caches are emptied")
    resume: bool | None = Field(
        default=None,
        description="null: serve again, unless a caller had paused the engine before; true: "
        "always; false: stay paused",
    )
    timeout_s: Seconds = Field(
        default=300.0, description="of prepare: until the commit, which then has as much again"
    )
    force: bool = Field(default=False, description="install a version that is not newer")
    source_word: int | None = Field(
        default=None,
        ge=1,
        lt=_EXACT,
        description="what the version words of all sources hold for this update; null: what they "
        "hold when it begins. One that differs then or later means that the offer was taken back",
    )


class CommitBody(_Body):
    """Which prepared update to install."""

    model_config = _example({"request_id": "step-7"})

    request_id: RequestId = Field(description="as it was prepared under")


class AbortBody(CommitBody):
    """Which prepared update to give up."""

    model_config = _example({"request_id": "step-7", "writes_ended": True})

    writes_ended: bool = Field(
        default=False,
        description="of a push: no write of the trainer is under way, so its targets can be used "
        "again",
    )


class SleepBody(_Body):
    """How deep to sleep, and what to release."""

    model_config = _example({"level": 1, "tags": ["weights", "kv_cache"]})

    level: int = Field(  # to a Literal, true would be 1
        default=1,
        ge=1,
        le=2,
        description="1: weights come back at wake; 2: an update has to bring new ones",
    )
    tags: list[MemoryTag] | None = Field(
        default=None, min_length=1, description="null: everything that the engine can release"
    )
    pause: PauseMode = Field(
        default="keep", description="what becomes of requests: held ones recompute their KV"
    )
    timeout_s: Seconds = Field(default=30.0, description="of the pause")


class WakeBody(_Body):
    """What to map again."""

    model_config = _example({"tags": None})

    tags: list[MemoryTag] | None = Field(
        default=None, min_length=1, description="null: everything that is released"
    )


class GateBody(_Body):
    """What to change of the prefill gate until the server ends; what is left out stays.

    The types are checked here, the values where the server's own settings are.
    """

    model_config = _example({"mode": "observe", "margin_quantile": 0.99})

    mode: _Mode = Field(
        default_factory=str, description="whether prefills are judged, and held to it"
    )
    cap_bytes: _CapBytes | None = Field(
        default_factory=lambda: None, description="of a rank; null: what is free"
    )
    margin_quantile: _Quantile = Field(default_factory=float, description="of prediction errors")
    margin_bytes: _MarginBytes = Field(
        default_factory=int, description="what the margin never falls below"
    )
