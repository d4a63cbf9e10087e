"""Plans are kept while the sources' topology is the same, and follow their addresses."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgspec
import numpy as np
import pytest

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.contract.manifest import SourceManifest, numbers, packed
from engine_plugins.weights.planning import plan_cache
from engine_plugins.weights.planning.plan import build_plan
from engine_plugins.weights.planning.plan_cache import PlanCache, rebased, same_topology
from engine_plugins.weights.planning.plan_data import FetchPlan, Step
from tests.support.model_shapes import QWEN3_30B_A3B, logical_tensors_of
from tests.support.simulated_trainers import SimulatedJob

TENSORS = logical_tensors_of(QWEN3_30B_A3B | {"num_hidden_layers": 2, "num_experts": 8})
HALVES = {
    tensor.name: [((0,) * len(tensor.shape), (*tensor.shape[:-1], tensor.shape[-1] // 2))]
    for tensor in TENSORS
}
"""Half of every row: some parts are read straight, some as packed rows."""
STEPS: list[tuple[list[str], list[LogicalTensor]]] = [
    (["first"], TENSORS[: len(TENSORS) // 2]),
    (["second"], TENSORS[len(TENSORS) // 2 :]),
]


def offers(*, tp: int = 2, address: int = 1 << 40) -> list[SourceManifest]:
    """Four ranks, whose memory is in two regions each."""
    job = SimulatedJob(TENSORS, ranks=4, tp=tp, ep=4, region_address=address)
    return [_in_two_regions(manifest) for manifest in job.manifests()]


def _in_two_regions(manifest: SourceManifest) -> SourceManifest:
    """The second half of the boxes lies in a region of its own, below the first."""
    boxes, regions = manifest.boxes, manifest.regions
    offsets = numbers(boxes.offsets_bytes)
    second = np.arange(len(offsets)) >= len(offsets) // 2
    cut, end = int(offsets[second][0]), int(numbers(regions.nbytes)[0])
    address = int(numbers(regions.addresses)[0])
    return msgspec.structs.replace(
        manifest,
        regions=msgspec.structs.replace(
            regions,
            addresses=packed([address, address // 2]),
            nbytes=packed([cut, end - cut]),
            devices=packed([-1, -1]),
        ),
        boxes=msgspec.structs.replace(
            boxes,
            regions=second.astype(np.int64).tobytes(),
            offsets_bytes=(offsets - cut * second).tobytes(),
        ),
    )


def plan_of(manifests: list[SourceManifest]) -> FetchPlan:
    return build_plan(manifests, STEPS, HALVES)


def assert_same(one: FetchPlan, other: FetchPlan) -> None:
    assert len(one.steps) == len(other.steps)
    for step, twin in zip(one.steps, other.steps, strict=True):
        for each in fields(Step):
            mine, theirs = getattr(step, each.name), getattr(twin, each.name)
            if each.name == "reads":
                for read, same in zip(mine, theirs, strict=True):
                    assert (read.source, read.remote_device) == (same.source, same.remote_device)
                    np.testing.assert_array_equal(read.descriptors, same.descriptors)
            elif each.name in ("offsets", "strides_bytes"):
                np.testing.assert_array_equal(mine, theirs)
            else:
                assert mine == theirs, each.name


@pytest.mark.parametrize("address", [1 << 41, 1 << 20])
def test_a_plan_follows_addresses_up_and_down(address: int) -> None:
    """Rebased, it is the plan that would have been made."""
    before, after = offers(), offers(address=address)
    plan = plan_of(before)
    assert any(step.packed for step in plan.steps)
    assert any(step.reads for step in plan.steps)
    assert same_topology(before, after)
    assert_same(rebased(plan, before, after), plan_of(after))


def test_a_plan_is_kept_for_the_same_memory_and_dropped_with_the_topology() -> None:
    made: list[list[SourceManifest]] = []

    def plan(manifests: list[SourceManifest], key: str = "pull") -> FetchPlan:
        def make() -> FetchPlan:
            made.append(manifests)
            return plan_of(manifests)

        return cache.plan(manifests, key, make)

    cache = PlanCache()
    first, same, moved, other = offers(), offers(), offers(address=1 << 30), offers(tp=4)
    kept = plan(first)
    assert plan(first) is kept
    assert plan(same) is kept, "another connection from the same memory"
    assert_same(plan(moved), plan_of(moved))
    assert made == [first]
    plan(moved, "push")
    plan(other)
    assert made == [first, moved, other]
    plan(moved)
    assert made == [first, moved, other, moved], "one topology is kept at a time"
    cache.clear()
    plan(moved)
    assert len(made) == 5


def test_what_has_no_address_is_kept_as_it_is() -> None:
    cache, calls = PlanCache(), list[int]()
    for manifests in (offers(), offers(address=1 << 30), offers(tp=4)):
        cache.finding(manifests, "tensors", lambda: calls.append(1))
    assert len(calls) == 2


CHANGES: dict[str, dict[str, Any]] = {
    "a shape": {"tensors": {"shapes": packed([1, 2] * len(TENSORS))}},
    "a dtype": {"tensors": {"dtypes": ["float32"] * len(TENSORS)}},
    "a region's size": {"regions": {"nbytes": packed([1, 1])}},
    "a region's device": {"regions": {"devices": packed([0, 0])}},
    "an offset": {"boxes": {"offsets_bytes": packed([0])}},
    "the host": {"host": "elsewhere"},
    "the rank": {"global_rank": 77},
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_difference_is_another_topology(change: str) -> None:
    first, second = offers(), offers()
    new = {
        field: msgspec.structs.replace(getattr(second[1], field), **value)
        if isinstance(value, dict)
        else value
        for field, value in CHANGES[change].items()
    }
    second[1] = msgspec.structs.replace(second[1], **new)
    assert not same_topology(first, second)
    assert not same_topology(first, first[:3])


def test_a_plan_that_cannot_follow_leaves_all_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two plans the second fails to move: the first has not either, and both move once after."""
    cache, before, after = PlanCache(), offers(), offers(address=1 << 41)
    for key in ("pull", "push"):
        cache.plan(before, key, lambda: plan_of(before))
    moved: list[FetchPlan] = []

    def at_first(plan: FetchPlan, *sources: list[SourceManifest]) -> FetchPlan:
        moved.append(plan)
        if len(moved) == 2:
            raise MemoryError
        return rebased(plan, *sources)

    monkeypatch.setattr(plan_cache, "rebased", at_first)
    with pytest.raises(MemoryError):
        cache.plan(after, "pull", lambda: plan_of(after))
    for key in ("pull", "push"):
        assert_same(cache.plan(after, key, lambda: plan_of(after)), plan_of(after))
    assert len(moved) == 4
