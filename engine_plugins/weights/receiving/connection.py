"""The sources that a rank is connected to: what it wants of them, and the plans for it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine_plugins.weights.boxes.dtypes import dtype_name
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import Interval
from engine_plugins.weights.contract.destinations import Destination
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.contract.report import RankPlan
from engine_plugins.weights.loader.coverage import (
    EngineStep,
    LoaderRules,
    engine_steps,
    left_out,
    parameters_by_coverage,
)
from engine_plugins.weights.loader.dtype_fit import wanted_dtypes
from engine_plugins.weights.loader.loader_trace import LoaderTrace
from engine_plugins.weights.planning.places import place_sizes
from engine_plugins.weights.planning.plan import build_plan, coalesced, laid_apart
from engine_plugins.weights.planning.plan_cache import PlanCache
from engine_plugins.weights.planning.plan_data import FetchPlan
from engine_plugins.weights.planning.source_choice import Reader
from engine_plugins.weights.receiving.landing import Landing

__all__ = ["ConnectResult", "Connection", "Direction", "other_dtypes", "rank_plan"]

Direction = Literal["pull", "push"]

_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Sources that this rank knows, and what it wants of them."""

    direction: Direction
    manifests: Sequence[SourceManifest]
    steps: Sequence[EngineStep]
    needed: Mapping[str, Sequence[Interval]]
    strided: frozenset[str] = frozenset()
    """Tensors that the loader reads alike through any strides."""
    plans: dict[frozenset[str], FetchPlan] = field(default_factory=dict)
    """By the modules that land directly; made once."""

    def plan(
        self, landing: Landing, reader: Reader, cache: PlanCache, *, direct: bool
    ) -> FetchPlan:
        """The plan with the proven modules landing directly, or with none."""
        chosen = [mods for mods, _ in self.steps if direct and landing.proven >= set(mods)]
        modules = frozenset(module for modules in chosen for module in modules)

        def made() -> FetchPlan:
            tensors = [tensor for _, tensors in self.steps for tensor in tensors]
            sizes = place_sizes(tensors, self.needed, self.strided)
            steps, live = coalesced(self.steps, modules, sizes), landing.live_boxes(modules)
            return build_plan(self.manifests, steps, self.needed, live, reader, self.strided)

        if modules not in self.plans:
            plan = cache.plan(self.manifests, modules, made)
            self.plans[modules] = laid_apart(plan) if self.direction == "push" else plan
        return self.plans[modules]


@dataclass(frozen=True, kw_only=True)
class ConnectResult:
    """What a rank answers to `connect`."""

    plan: RankPlan
    unused: list[str]
    """HF names that reached no parameter of this rank and are not known to be ignorable."""
    plan_s: float
    connect_s: float
    destination: Destination | None
    """Of a push, where the trainers write."""
    wanted: dict[str, list[str]] = field(default_factory=dict)
    """Tensors that must come in another dtype, by its name; then the plan is empty."""


def other_dtypes(
    trace: LoaderTrace,
    tensors: Sequence[LogicalTensor],
    rules: LoaderRules,
    *,
    tp_rank: int,
    since: float,
    partial: bool = False,
) -> ConnectResult | None:
    """What a rank answers where tensors must come in other dtypes; None where none must.

    Args:
        trace: what the loader does with these tensors.
        tensors: as they are offered.
        rules: of the loader.
        tp_rank: of this rank.
        since: when planning began, on the performance counter.
        partial: see `engine_steps`.

    Raises:
        WeightMismatchError: something else does not fit.
    """
    wanted = wanted_dtypes(trace, tensors, rules.model_dtype)
    if not wanted:
        return None
    _, unused = engine_steps(trace, tensors, rules, mended=wanted.keys(), partial=partial)
    by_dtype: dict[str, list[str]] = {}
    for name, dtype in wanted.items():
        by_dtype.setdefault(dtype_name(dtype), []).append(name)
    return ConnectResult(
        plan=_empty_plan(tp_rank),
        unused=unused,
        plan_s=time.perf_counter() - since,
        connect_s=0.0,
        destination=None,
        wanted=by_dtype,
    )


def _empty_plan(tp_rank: int) -> RankPlan:
    return RankPlan(
        tp_rank=tp_rank,
        bytes_needed=0,
        bytes_to_move=0,
        operations=0,
        direct_bytes=0,
        staged_bytes=0,
        loader_bytes=0,
        steps=0,
        largest_step_bytes=0,
        arena_bytes=0,
    )


def rank_plan(
    plan: FetchPlan, trace: LoaderTrace, landing: Landing, tp_rank: int, arena_bytes: int
) -> RankPlan:
    """What a rank says of its plan: bytes by way in, and why modules go through the loader."""
    moved = sum(step.bytes_to_move for step in plan.steps)
    needed = sum(step.bytes_needed for step in plan.steps)
    modules = [module for step in plan.steps if not step.direct for module in step.modules]
    reasons = [f"{name}: {landing.reasons[name]}" for name in modules if name in landing.reasons]
    loaded, idle = parameters_by_coverage(trace)
    return RankPlan(
        tp_rank=tp_rank,
        parameters_loaded=loaded,
        parameters_idle=idle[:_SHOWN],
        parameters_left=len(left_out(trace)),
        bytes_needed=needed,
        bytes_to_move=moved,
        operations=sum(step.operations for step in plan.steps),
        direct_bytes=plan.direct_bytes,
        staged_bytes=0,
        loader_bytes=needed - plan.direct_bytes,
        reasons=reasons[:_SHOWN],
        steps=len(plan.steps),
        largest_step_bytes=plan.largest_step_bytes,
        arena_bytes=arena_bytes,
    )
