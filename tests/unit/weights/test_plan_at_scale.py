"""Plans of many sources: right to the byte, refused as before, and no dearer than linear.

Nothing here is timed. Work is counted as the lines of ours that run, which vectorised steps add
nothing to however many boxes they take; growth is held as a ratio of it.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from math import prod
from types import FrameType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_plugins.errors import PlanError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import Interval, check_exact_coverage
from engine_plugins.weights.contract.manifest import (
    SourceManifest,
    decode_manifest,
    encode_manifest,
)
from engine_plugins.weights.contract.manifest_reader import ManifestReader
from engine_plugins.weights.loader.needed import _disjoint
from engine_plugins.weights.planning import source_table as source_table_module
from engine_plugins.weights.planning.box_table import BoxTable, TensorTable
from engine_plugins.weights.planning.exact_cover import not_told_apart
from engine_plugins.weights.planning.logical_tensors import logical_tensors
from engine_plugins.weights.planning.plan import build_plan
from engine_plugins.weights.planning.plan_data import FetchPlan
from engine_plugins.weights.planning.source_table import source_table
from tests.support.model_shapes import QWEN3_30B_A3B, fused, logical_tensors_of
from tests.support.simulated_fsdp import simulated_fsdp
from tests.support.simulated_trainers import SimulatedJob

SMALL = QWEN3_30B_A3B | {"num_hidden_layers": 2, "num_experts": 16}
TENSORS = logical_tensors_of(SMALL)
OURS = re.compile(r"engine_plugins/weights/(planning|contract|boxes|loader)/")


# -- which boxes overlap ----------------------------------------------------------------------


@st.composite
def boxes(draw: st.DrawFn, axes: int) -> list[Interval]:
    """Different boxes of one small tensor, in any relation to each other."""
    ends = st.tuples(st.integers(0, 5), st.integers(1, 3))
    made = draw(st.lists(st.tuples(*[ends] * axes), min_size=1, max_size=7, unique=True))
    return sorted((tuple(a for a, _ in box), tuple(n for _, n in box)) for box in made)


def overlap(one: Interval, other: Interval) -> bool:
    """By the book."""
    axes = zip(*one, *other, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in axes)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 3))
def test_no_overlap_is_missed_whatever_the_boxes(data: st.DataObject, axes: int) -> None:
    """Several tensors at once; boxes around a hole may be doubted, and cut ones never are."""
    tensors = data.draw(st.lists(boxes(axes), min_size=1, max_size=4))
    flat = [(number, *box) for number, each in enumerate(tensors) for box in each]
    table = BoxTable(
        tensor=np.array([number for number, _, _ in flat], np.int64),
        start=np.array([start for _, start, _ in flat], np.int64),
        shape=np.array([shape for _, _, shape in flat], np.int64),
    )
    doubted = set(not_told_apart(table).tolist())
    for number, each in enumerate(tensors):
        meet = any(overlap(*pair) for pair in itertools.combinations(each, 2))
        if meet:
            assert number in doubted
        elif len(each) < 4:  # a hole takes four boxes around it
            assert number not in doubted


PINWHEEL: list[Interval] = [
    ((0, 0), (1, 2)),
    ((0, 2), (2, 1)),
    ((1, 0), (2, 1)),
    ((1, 1), (1, 1)),
    ((2, 1), (1, 2)),
]
"""Five boxes that fill a square, and that no line across it parts."""


def offer(shape: tuple[int, ...], *ranks: Sequence[Interval]) -> list[SourceManifest]:
    """Manifests of one tensor `w`, each rank with these boxes of it."""
    tensor = LogicalTensor(name="w", shape=shape, dtype=torch.float32)
    made = simulated_fsdp([tensor], ranks=len(ranks))
    return [_with_boxes(manifest, rank) for manifest, rank in zip(made, ranks, strict=True)]


def _with_boxes(manifest: SourceManifest, boxes_of: Sequence[Interval]) -> SourceManifest:
    shapes = np.array([shape for _, shape in boxes_of], np.int64).reshape(-1, manifest.axes)
    inner = np.concatenate([shapes[:, 1:], np.full((len(shapes), 1), 4)], axis=1)
    zeros = np.zeros(len(shapes), np.int64).tobytes()
    columns = msgspec.structs.replace(
        manifest.boxes,
        tensors=zeros,
        starts=np.array([start for start, _ in boxes_of], np.int64).tobytes(),
        shapes=shapes.tobytes(),
        regions=zeros,
        offsets_bytes=zeros,
        strides_bytes=inner[:, ::-1].cumprod(axis=1)[:, ::-1].tobytes(),
    )
    return msgspec.structs.replace(manifest, boxes=columns)


def test_boxes_around_a_hole_are_a_tensor_like_any_other() -> None:
    """They cannot be told apart by lines, so they are looked at one by one, and are sound."""
    tensor = LogicalTensor(name="w", shape=(3, 3), dtype=torch.float32)
    manifests = offer((3, 3), *[[box] for box in PINWHEEL])
    assert len(source_table(manifests, TensorTable([tensor])).distinct) == 5
    plan = build_plan(manifests, [(["m"], [tensor])])
    assert plan.steps[0].bytes_needed == tensor.nbytes


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_offers_are_refused_exactly_where_the_reference_refuses_them(data: st.DataObject) -> None:
    """Gaps, overlaps, boxes outside, replicas: the same verdict and words, and who said it."""
    shape = (4, 4)
    part = st.tuples(
        st.tuples(st.integers(0, 3), st.integers(0, 3)),
        st.tuples(st.integers(1, 4), st.integers(1, 4)),
    )
    halves: list[Interval] = [((0, 0), (2, 4)), ((2, 0), (2, 4))]
    rank = st.one_of(st.lists(st.sampled_from(halves), max_size=2), st.lists(part, max_size=2))
    ranks = data.draw(st.lists(rank, min_size=1, max_size=4))
    manifests = offer(shape, *ranks)
    tensor = LogicalTensor(name="w", shape=shape, dtype=torch.float32)
    every = [box for boxes_of in ranks for box in boxes_of]
    try:
        check_exact_coverage("w", shape, every)
    except PlanError as error:
        expected = error.message
        with pytest.raises(PlanError) as caught:
            source_table(manifests, TensorTable([tensor]))
        assert caught.value.message.startswith(expected)
        first = next((manifest for manifest in manifests if manifest.box_count), None)
        said = "nobody offers it" if first is None else f"{first.source} offers "
        assert said in caught.value.message
    else:
        table = source_table(manifests, TensorTable([tensor]))
        found = zip(table.distinct.start.tolist(), table.distinct.shape.tolist(), strict=True)
        assert [(tuple(a), tuple(n)) for a, n in found] == sorted(set(every))


def test_every_replica_of_a_box_is_known_whatever_columns_it_comes_in() -> None:
    """Two ways to name the same boxes, dealt in turn to six sources; each has its own row."""
    upper, lower = ((0, 0), (2, 4)), ((2, 0), (2, 4))
    ranks = [[upper, lower], [lower, upper], [upper], [upper, lower], [lower], [lower, upper]]
    manifests = offer((4, 4), *ranks)
    tensor = LogicalTensor(name="w", shape=(4, 4), dtype=torch.float32)
    table = source_table(manifests, TensorTable([tensor]))
    first, source, row = table.replicas(np.array([1, 0]))
    assert first.tolist() == [0, 5, 10]
    assert source.tolist() == [0, 1, 3, 4, 5, 0, 1, 2, 3, 5]
    assert row.tolist() == [1, 0, 1, 0, 0, 0, 1, 0, 0, 1]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from("abcd"),
                st.sampled_from([torch.float32, torch.bfloat16]),
                st.sampled_from([(4,), (1, 4), (4, 1)]),
            ),
            min_size=1,
            max_size=4,
            unique_by=lambda fact: fact[0],
        ),
        min_size=1,
        max_size=5,
    )
)
def test_sources_agree_exactly_where_each_name_means_one_thing(
    ranks: list[list[tuple[str, torch.dtype, tuple[int, ...]]]],
) -> None:
    """Name by name: in the order of appearance, or the first that says otherwise, and who."""
    manifests = [_naming(number, facts) for number, facts in enumerate(ranks)]
    known: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
    unlike: list[str] = []
    for number, facts in enumerate(ranks):
        for name, dtype, shape in facts:
            first = known.setdefault(name, (number, dtype, shape))
            if first[1:] != (dtype, shape) and not unlike:
                unlike = [
                    f"{name}: rank {first[0]} says {first[2]} {first[1]}",
                    f"rank {number} says {shape} {dtype}",
                ]
    if unlike:
        with pytest.raises(PlanError) as caught:
            logical_tensors(manifests)
        assert caught.value.message == ", ".join(unlike)
    else:
        assert logical_tensors(manifests) == [
            LogicalTensor(name=name, shape=shape, dtype=dtype)
            for name, (_, dtype, shape) in known.items()
        ]


def _naming(
    number: int, facts: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
) -> SourceManifest:
    """A manifest that names tensors, and has boxes of none."""
    tensors = [LogicalTensor(name=name, shape=shape, dtype=facts[0][1]) for name, _, shape in facts]
    manifest = simulated_fsdp(tensors, ranks=1)[0]
    dtypes = [str(dtype).removeprefix("torch.") for _, dtype, _ in facts]
    columns = msgspec.structs.replace(manifest.tensors, dtypes=dtypes)
    return msgspec.structs.replace(manifest, source=f"rank {number}", tensors=columns)


# -- manifests read together ------------------------------------------------------------------


def test_what_manifests_say_alike_is_held_once() -> None:
    """Names of all ranks, shapes and offsets of alike shards; and what is read is what was sent."""
    sent = simulated_fsdp(TENSORS, ranks=4, replicas=2)
    reader = ManifestReader()
    read = [reader.read(encode_manifest(manifest)) for manifest in sent]
    assert read == sent
    assert len({id(manifest.tensors) for manifest in read}) == 1
    assert len({id(manifest.boxes.starts) for manifest in read}) == 4
    assert read[0].boxes.starts is read[4].boxes.starts
    other = reader.read(encode_manifest(simulated_fsdp(TENSORS[:-1], ranks=4)[0]))
    assert other.tensors.names[0] is read[0].tensors.names[0]


def test_tensors_checked_before_are_no_excuse_for_others() -> None:
    """The check of tensors is remembered by value: one number more, and it is made anew."""
    sound = simulated_fsdp(TENSORS, ranks=2)[0]
    decode_manifest(encode_manifest(sound), max_entries=1000)
    twice = msgspec.structs.replace(
        sound.tensors, names=[*sound.tensors.names[:-1], sound.tensors.names[0]]
    )
    wrong = msgspec.structs.replace(sound, tensors=twice)
    with pytest.raises(Exception, match="listed twice"):
        decode_manifest(encode_manifest(wrong), max_entries=1000)


# -- growth -----------------------------------------------------------------------------------


def lines_of(work: Callable[[], object]) -> int:
    """Lines of ours that run: a loop over tensors, boxes or sources shows, a column does not."""
    count = 0

    def local(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return local

    def called(frame: FrameType, event: str, arg: object) -> Any:
        return local if OURS.search(frame.f_code.co_filename) else None

    before = sys.gettrace()
    sys.settrace(called)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def plan_of(manifests: Sequence[SourceManifest]) -> FetchPlan:
    """Read, agree and plan, as a rank does that wants half of every row."""
    reader = ManifestReader()
    read = [reader.read(encode_manifest(manifest)) for manifest in manifests]
    tensors = logical_tensors(read)
    halves = {
        tensor.name: [((0,) * len(tensor.shape), (*tensor.shape[:-1], tensor.shape[-1] // 2))]
        for tensor in tensors
    }
    return build_plan(read, [([t.name], [t]) for t in tensors], halves)


def fsdp(ranks: int) -> Iterator[SourceManifest]:
    yield from simulated_fsdp(TENSORS, ranks=ranks)


def fsdp_of_fused_experts(ranks: int) -> Iterator[SourceManifest]:
    yield from simulated_fsdp(fused(TENSORS), ranks=ranks, axis=1)


def megatron(ranks: int) -> Iterator[SourceManifest]:
    yield from SimulatedJob(TENSORS, ranks=ranks, tp=2, ep=4, pp=2).manifests()


@pytest.mark.parametrize("job", [fsdp, fsdp_of_fused_experts, megatron])
def test_four_times_the_ranks_take_at_most_four_times_the_work(
    job: Callable[[int], Iterator[SourceManifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 16 ranks on, and no sound tensor is looked at by itself, in however many boxes it is."""

    def looked_at(name: str, *rest: object) -> None:
        raise AssertionError(f"{name} was looked at by itself")

    monkeypatch.setattr(source_table_module, "check_exact_coverage", looked_at)
    few, many = (lines_of(functools.partial(plan_of, [*job(ranks)])) for ranks in (16, 64))
    assert 1000 < many <= 4 * few


def test_four_times_the_tensors_take_at_most_four_times_the_work() -> None:
    """In 32 boxes each."""

    def work(experts: int) -> int:
        tensors = logical_tensors_of(SMALL | {"num_experts": experts})
        return lines_of(lambda: plan_of(simulated_fsdp(tensors, ranks=32)))

    assert work(64) <= 4.1 * work(16)


def test_a_fault_among_many_tensors_is_looked_for_once() -> None:
    """One of 64 ranks lacks a box: it is named, and only its tensor is looked at by itself."""

    def faulty(ranks: int) -> None:
        manifests = simulated_fsdp(TENSORS, ranks=ranks)
        last = manifests[-1]
        columns = msgspec.structs.asdict(last.boxes)
        one = len(columns["starts"]) // last.box_count
        cut = {name: each[: -one if name in TABLES else -8] for name, each in columns.items()}
        manifests[-1] = msgspec.structs.replace(
            last, boxes=msgspec.structs.replace(last.boxes, **cut)
        )
        with pytest.raises(PlanError, match=r"lm_head\.weight: the sources give .* of "):
            source_table(manifests, TensorTable(TENSORS))

    assert lines_of(lambda: faulty(64)) <= 4 * lines_of(lambda: faulty(16))


TABLES = ("starts", "shapes", "strides_bytes")


def test_needed_boxes_of_many_experts_cost_no_more_than_their_number() -> None:
    """A loader that takes a fused tensor expert by expert, gate and up apart."""

    def experts(count: int) -> set[Interval]:
        return {((e, first, 0), (1, 2, 8)) for e in range(count) for first in (0, 8)}

    assert _disjoint(experts(64)) == (((0, 0, 0), (64, 2, 8)), ((0, 8, 0), (64, 2, 8)))
    few, many = (lines_of(functools.partial(_disjoint, experts(count))) for count in (64, 256))
    assert many <= 4 * few
    # Every other expert: nothing to join.
    apart = {box for box in experts(64) if box[0][0] % 2}
    assert set(_disjoint(apart)) == apart
    assert sum(prod(extent) for _, extent in apart) == 64 * 16
