"""Boxes of a tensor cover it exactly once, or the gap or overlap is named."""

from __future__ import annotations

import itertools
import time
from math import prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine_plugins.errors import PlanError, SourceError
from engine_plugins.weights.boxes.placement import SourceBox, assemble, check_exact_coverage

Interval = tuple[tuple[int, ...], tuple[int, ...]]
Sharding = tuple[tuple[int, ...], list[Interval]]


@st.composite
def shardings(draw: st.DrawFn) -> Sharding:
    """A shape, and boxes that cover it once: repeated cuts along random axes."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)))
    boxes: list[Interval] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        start, extent = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, extent[axis]))
        lower, upper = list(extent), list(extent)
        lower[axis], upper[axis] = cut, extent[axis] - cut
        moved = list(start)
        moved[axis] += cut
        boxes += [(start, tuple(lower)), (tuple(moved), tuple(upper))]
    return shape, draw(st.permutations(boxes))


def source_box(whole: torch.Tensor, box: Interval) -> SourceBox:
    start, extent = box
    index = tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))
    return SourceBox(name="w", global_shape=tuple(whole.shape), start=start, data=whole[index])


@settings(max_examples=150, deadline=None)
@given(shardings(), st.data())
def test_any_sharding_rebuilds_the_tensor(sharding: Sharding, data: st.DataObject) -> None:
    """Replicas and empty boxes change nothing, whatever the strides."""
    shape, boxes = sharding
    whole = torch.randn(shape[::-1]).permute(tuple(reversed(range(len(shape)))))
    replicas = data.draw(st.lists(st.sampled_from(boxes), max_size=3))
    rebuilt = assemble(source_box(whole, box) for box in [*boxes, *replicas])
    assert torch.equal(rebuilt["w"], whole)
    assert rebuilt["w"].is_contiguous()


@given(shardings(), st.data())
def test_a_gap_is_always_found(sharding: Sharding, data: st.DataObject) -> None:
    shape, boxes = sharding
    lost = data.draw(st.sampled_from([box for box in boxes if prod(box[1])]))
    with pytest.raises(PlanError, match=r"w: the sources give \d+ of \d+ elements"):
        check_exact_coverage("w", shape, [box for box in boxes if box != lost])


@given(shardings(), st.data())
def test_an_overlap_is_always_found(sharding: Sharding, data: st.DataObject) -> None:
    """An extra box that no shard equals covers something twice."""
    shape, boxes = sharding
    assume(shape)
    start = tuple(data.draw(st.integers(0, extent - 1)) for extent in shape)
    extent = tuple(
        data.draw(st.integers(1, whole - first)) for first, whole in zip(start, shape, strict=True)
    )
    assume((start, extent) not in boxes)
    with pytest.raises(PlanError, match=r"w: the boxes .* overlap without being equal"):
        check_exact_coverage("w", shape, [*boxes, (start, extent)])


@pytest.mark.parametrize("start", [(4,), (-1,), (0, 0)])
def test_a_box_outside_cannot_make_up_for_a_gap(start: tuple[int, ...]) -> None:
    """Two rows inside and two outside are not four rows of four."""
    boxes = [((0,), (2,)), (start, (2,) * len(start))]
    with pytest.raises(PlanError, match="does not lie inside"):
        check_exact_coverage("w", (4,), boxes)


def test_nothing_offered_is_a_gap() -> None:
    with pytest.raises(PlanError, match="0 of 6 elements"):
        check_exact_coverage("w", (2, 3), [])


@pytest.mark.parametrize("axis", [0, 1])
def test_many_shards_along_either_axis_are_checked_in_linear_time(axis: int) -> None:
    """20,000 row-parallel or column-parallel shards: quadratic work would take minutes."""
    count = 20_000
    shape, extent = [8, 8], [8, 8]
    shape[axis], extent[axis] = count, 1
    places = itertools.product(range(count), [0])
    starts = [place if axis == 0 else place[::-1] for place in places]
    began = time.thread_time()
    check_exact_coverage("w", shape, [(start, tuple(extent)) for start in starts])
    assert time.thread_time() - began < 5


@pytest.mark.parametrize(
    ("start", "shape"), [((3, 0), (2, 4)), ((-1, 0), (2, 4)), ((0,), (2, 4)), ((0, 0), (2,))]
)
def test_a_source_box_lies_inside_its_tensor(
    start: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    with pytest.raises(SourceError, match=r"w: the box at .* does not lie inside"):
        SourceBox(name="w", global_shape=(4, 4), start=start, data=torch.zeros(shape))


@pytest.mark.parametrize(
    "other", [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(3)], ids=["dtype", "shape"]
)
def test_ranks_that_disagree_about_a_tensor_are_an_error(other: torch.Tensor) -> None:
    boxes = [
        SourceBox(name="w", global_shape=tuple(data.shape), start=(0,), data=data)
        for data in (torch.zeros(2), other)
    ]
    with pytest.raises(PlanError, match="w: ranks disagree"):
        assemble(boxes)


def test_a_box_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(PlanError, match=r"at \(0,\) of shape \(2, 2\)"):
        check_exact_coverage("w", (2, 2), [((0,), (2, 2))])


def test_an_empty_box_overlaps_nothing() -> None:
    """A rank may hold no rows of a tensor, wherever it thinks they begin."""
    check_exact_coverage("w", (4,), [((0,), (4,)), ((2,), (0,))])
