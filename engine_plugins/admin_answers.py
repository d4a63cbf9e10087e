"""What engines answer to a trainer, and the update that it asks for: plain typed data."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from engine_plugins.weights.contract.report import UpdateReport
from engine_plugins.whole_number import whole_number

__all__ = [
    "Direction",
    "EngineOffer",
    "EngineState",
    "InstalledWeights",
    "PauseMode",
    "Progress",
    "UpdateRequest",
    "Weights",
]

PauseMode = Literal["keep", "wait", "abort"]

Direction = Literal["pull", "push"]
"""Who moves the bytes: the engine reads them, or the trainer writes them."""


class InstalledWeights(msgspec.Struct, frozen=True, kw_only=True):
    """The version that an engine holds; `None` is what it was started with."""

    version: int | None = None
    request_id: str | None = None
    digest: str | None = None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a running update is."""

    request_id: str = ""
    version: int | None = None
    phase: str = ""
    bytes_done: int = 0
    bytes_total: int = 0


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """The part of State that a trainer acts on; fields that it does not know are ignored."""

    state: str
    since: float = 0.0
    """When it came to be in this state, by the server's clock."""
    weights: InstalledWeights = InstalledWeights()
    pause: dict[str, Any] | None = None
    sleep: dict[str, Any] | None = None
    fence: dict[str, Any] | None = None
    update: Progress | None = None
    engine: dict[str, Any] = {}
    requests: dict[str, Any] = {}
    workers: list[dict[str, Any]] = []


class EngineOffer(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine offers its peers: its weights where they lie, and which version they are."""

    version: int
    request_id: str | None
    """Of the update that installed them."""
    manifests: list[bytes]
    """One for each rank, as msgpack; base64 in JSON."""
    source_word: int | None = None
    """What their version words hold until the engine takes other weights."""


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine says about its weights: the version, its history and its plans."""

    version: int | None = None
    history: list[UpdateReport] = []
    plans: list[dict[str, Any]] = []


class UpdateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of `POST /weights/update` and `/prepare`; see the admin contract for each field.

    Raises:
        SettingsError: a version that is no whole number; numpy's and torch's are some.
    """

    plan_id: str
    version: int
    request_id: str
    mode: Literal["auto", "staged", "in_place"] = "auto"
    verify: Literal["none", "sample", "full"] = "none"
    pause: PauseMode = "keep"
    in_flight_kv: Literal["recompute", "keep"] = "recompute"
    flush: bool = True
    resume: bool | None = None
    timeout_s: float = 300.0
    force: bool = False
    source_word: int | None = None

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "version", whole_number(self.version, "version"))
