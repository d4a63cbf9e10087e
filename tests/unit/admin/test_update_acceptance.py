"""Updates of parts: only over weights that are a model's."""

from __future__ import annotations

import msgspec
import pytest

from engine_plugins.admin.state import EngineState, Fence, Sleep, WeightsInstalled
from engine_plugins.admin.update_acceptance import refuse_partial
from engine_plugins.errors import ConflictError
from engine_plugins.weights.contract.report import PlanSummary, RankPlan

RANK = RankPlan(
    tp_rank=0,
    bytes_needed=1,
    bytes_to_move=1,
    operations=1,
    direct_bytes=0,
    staged_bytes=0,
    loader_bytes=1,
    steps=1,
    largest_step_bytes=1,
    arena_bytes=1,
)
WHOLE = PlanSummary(
    plan_id="plan",
    direction="pull",
    bytes_needed=1,
    bytes_to_move=1,
    operations=1,
    direct_bytes=0,
    staged_bytes=0,
    loader_bytes=1,
    connect_s=0.0,
    plan_s=0.0,
    ranks=[RANK],
    destinations=[],
)
PART = msgspec.structs.replace(WHOLE, ranks=[msgspec.structs.replace(RANK, parameters_left=3)])
FENCE = Fence(code="half_way", detail="of 4", remedy="again", attempted_version=4)
LOST = Sleep(level=2, released=[], since=0.0, resume=True, weights_lost=True)
KEPT = Sleep(level=1, released=[], since=0.0, resume=True)


@pytest.mark.parametrize(
    ("state", "empty", "why"),
    [
        (EngineState(since=0.0, state="asleep", sleep=LOST), False, "discarded"),
        (EngineState(since=0.0, state="fenced", fence=FENCE), False, "fenced .half_way: of 4"),
        (EngineState(since=0.0), True, "load format dummy"),
    ],
)
def test_a_part_is_refused_where_the_rest_is_no_models(
    state: EngineState, empty: bool, why: str
) -> None:
    with pytest.raises(ConflictError, match=why) as raised:
        refuse_partial(state, PART, holds_nothing=empty)
    assert "every tensor first" in raised.value.remedy
    refuse_partial(state, WHOLE, holds_nothing=empty)


@pytest.mark.parametrize(
    ("state", "empty"),
    [
        (EngineState(since=0.0), False),
        (EngineState(since=0.0, state="asleep", sleep=KEPT), False),
        (EngineState(since=0.0, weights=WeightsInstalled(version=3)), True),
    ],
)
def test_a_part_is_taken_over_weights_that_were_loaded_or_sent(
    state: EngineState, empty: bool
) -> None:
    refuse_partial(state, PART, holds_nothing=empty)
