"""What a weight update says about itself: plain data, the same on every engine."""

from __future__ import annotations

from typing import Literal

import msgspec

from engine_plugins.weights.contract.destinations import Destination

__all__ = ["Outcome", "Phases", "PlanSummary", "RankPlan", "RankReport", "UpdateReport"]

Outcome = Literal["prepared", "installed", "aborted", "failed"]
"""`prepared` awaits its commit; `aborted` was given up before one."""


class Phases(msgspec.Struct, frozen=True, kw_only=True):
    """Wall seconds by phase; phases of one update may overlap (pull and install do).

    Connecting and planning are paid by the first update of a plan; later ones show 0.
    """

    wait_s: float = 0.0
    """For another call to end, from the request on."""
    connect_s: float = 0.0
    plan_s: float = 0.0
    pull_s: float = 0.0
    """Seconds on the wire: of the slowest rank, reads under way."""
    verify_s: float = 0.0
    pause_s: float = 0.0
    """From the request to pause until the scheduler stood still."""
    install_s: float = 0.0
    """Seconds in the engine's load path: of the slowest rank."""
    flush_s: float = 0.0
    resume_s: float = 0.0


class RankPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine rank will fetch, and by which way in."""

    tp_rank: int
    bytes_needed: int
    bytes_to_move: int
    operations: int
    """Descriptors on the wire after merging neighbours."""
    direct_bytes: int
    """Bytes that land in live parameters."""
    staged_bytes: int
    """Bytes that are copied from the receive buffer into live parameters."""
    loader_bytes: int
    """Bytes of tensors that the engine's own loader gets whole."""
    reasons: list[str] = []
    """Why modules go through the loader; of the first few."""
    parameters_loaded: int = 0
    """Parameters of this rank that the sources fill, every element of each."""
    parameters_idle: list[str] = []
    """Those that have nothing to load, by the engine's design; of the first few."""
    parameters_left: int = 0
    """Parameters that the sources leave out, and that stay as they are."""
    steps: int
    """Fetched and installed one after the other; each is a module, or a few small ones."""
    largest_step_bytes: int
    arena_bytes: int
    """Receive buffer of this rank, all of it."""


class PlanSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of an engine: totals over its ranks, and each rank's share."""

    plan_id: str
    direction: Literal["pull", "push"]
    bytes_needed: int
    bytes_to_move: int
    operations: int
    direct_bytes: int
    staged_bytes: int
    loader_bytes: int
    connect_s: float
    """Seconds to meet the peers and prepare descriptors: of the slowest rank."""
    plan_s: float
    """Seconds to trace the loader and intersect the maps: of the slowest rank."""
    ranks: list[RankPlan]
    destinations: list[Destination] = []
    """For a push, where each engine rank is written to; not kept by the server."""
    wanted: dict[str, list[str]] = {}
    """To a caller that asked for them: the tensors that must come in another dtype, by its name
    (`bfloat16`). Then there is no plan, and `plan_id` is empty."""


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """One engine rank's share of an update."""

    tp_rank: int
    pid: int
    bytes_moved: int
    direct_bytes: int = 0
    """Of the bytes needed, those that landed in live parameters."""
    staged_bytes: int = 0
    """Those that were copied from the receive buffer into live parameters."""
    loader_bytes: int = 0
    """Those that went through the engine's loader."""
    wire_s: float
    install_s: float
    peak_extra_bytes: int
    """Peak resident memory of the worker over what it held before, receive buffer included."""


class UpdateReport(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to an update; kept, and given again when its request_id comes again."""

    version: int
    request_id: str
    plan_id: str
    outcome: Outcome
    mode: Literal["staged", "in_place"]
    mode_reason: str = ""
    """Why this mode: `as asked`, or the figures by which `auto` chose it."""
    bytes_moved: int
    bytes_needed: int
    direct_bytes: int = 0
    staged_bytes: int = 0
    loader_bytes: int = 0
    gbps: float
    """Gigabytes (1e9 bytes) per second on the wire, all ranks together."""
    seconds: float
    """Wall seconds from the accepted request to the answer."""
    paused_s: float
    """Wall seconds for which generation stood still."""
    phases: Phases
    peak_extra_bytes: int
    """Of the rank with the highest peak."""
    ranks: list[RankReport]
    finished_at: float
    """Unix seconds."""
    error: dict[str, str] | None = None
    """For a failed update: `code`, `detail`, `remedy`."""
