"""A plan's bytes, carried out by hand over real memory, are the tensors that were offered."""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_plugins.errors import PlanError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.planning.logical_tensors import logical_tensors
from engine_plugins.weights.planning.packing import SHORT_RUN_BYTES
from engine_plugins.weights.planning.plan import build_plan, coalesced, laid_apart
from engine_plugins.weights.planning.plan_data import FetchPlan
from engine_plugins.weights.planning.ring import schedule
from tests.support.source_ranks import offered_boxes, random_bits, tensor_of, whole

Box = tuple[tuple[int, ...], tuple[int, ...]]
Needed = Mapping[str, Sequence[Box]]
UNTOUCHED = 0xFF


def carry_out(plan: FetchPlan, needed: Needed | None = None) -> dict[str, torch.Tensor]:
    """Execute every descriptor and packed piece; no byte twice, none outside, none left out."""
    landed: dict[str, torch.Tensor] = {}
    for step in plan.steps:
        buffer = torch.full((max(step.nbytes, 1),), UNTOUCHED, dtype=torch.uint8)
        times_written = torch.zeros(step.nbytes, dtype=torch.uint8)
        counts = []
        for landing in step.landings:
            first, tensor = landing.offset_bytes, landing.tensor
            assert first % 64 == 0
            end = first + tensor.nbytes
            item = tensor.dtype.itemsize
            counts.append(times_written[first:end].view(*tensor.shape, item))
            landed[tensor.name] = buffer[first:end].view(tensor.dtype).view(tensor.shape)
        for read in step.reads:
            for at, remote, nbytes in read.descriptors.tolist():
                assert 0 < nbytes
                assert at + nbytes <= step.nbytes
                ctypes.memmove(buffer.data_ptr() + at, remote, nbytes)
                times_written[at : at + nbytes] += 1
        for batch in step.packed:
            scratch = torch.full((plan.scratch_bytes,), UNTOUCHED, dtype=torch.uint8)
            used = torch.zeros(plan.scratch_bytes, dtype=torch.uint8)
            for piece in batch:
                at = piece.scratch_offset
                assert at + piece.nbytes <= plan.scratch_bytes
                ctypes.memmove(scratch.data_ptr() + at, piece.remote_address, piece.nbytes)
                used[at : at + piece.nbytes] += 1
            for piece in batch:
                block = scratch[piece.scratch_offset :][: piece.nbytes]
                wanted = block.view(piece.form.dtype).view(piece.form.shape)[piece.form.wanted]
                item = piece.form.dtype.itemsize
                place = (*wanted.shape, item), (*piece.form.target_strides, 1), piece.target
                view = buffer.as_strided(*place).view(piece.form.dtype)[..., 0]
                view.copy_(wanted)
                times_written.as_strided(*place).add_(1)
            assert int(used.max()) == 1
        for landing, count in zip(step.landings, counts, strict=True):
            shape = landing.tensor.shape
            boxes = (needed or {}).get(landing.tensor.name, [((0,) * len(shape), shape)])
            assert torch.equal(count, mask(shape, boxes)[..., None].expand_as(count))
    return landed


def mask(shape: tuple[int, ...], boxes: Sequence[Box]) -> torch.Tensor:
    """One where a box is, zero elsewhere."""
    marked = torch.zeros(shape, dtype=torch.uint8)
    for start, extent in boxes:
        marked[tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))] += 1
    return marked


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that NaNs keep."""
    flat = [each.contiguous().reshape(-1).view(torch.uint8) for each in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*flat)


# -- the ring ---------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=40),
    spare=st.integers(0, 30),
)
def test_a_step_never_overwrites_one_that_need_not_be_installed_yet(
    sizes: list[int], spare: int
) -> None:
    """The ring's whole promise: whoever shares bytes with a later step is waited for."""
    capacity = max(sizes) + spare
    windows = schedule(sizes, capacity)
    assert len(windows) == len(sizes)
    for index, (window, size) in enumerate(zip(windows, sizes, strict=True)):
        assert 0 <= window.offset_bytes
        assert window.offset_bytes + size <= capacity
        assert window.installed_before <= index, "a step that waits for itself never comes"
        for earlier in range(index):
            start, end = windows[earlier].offset_bytes, windows[earlier].offset_bytes
            end += sizes[earlier]
            if size and start < window.offset_bytes + size and window.offset_bytes < end:
                assert earlier < window.installed_before


@given(sizes=st.lists(st.integers(0, 100), min_size=1, max_size=40))
def test_room_for_everything_waits_for_nothing(sizes: list[int]) -> None:
    """That is a staged update: all of it is here before anything is installed."""
    windows = schedule(sizes, sum(sizes))
    assert {window.installed_before for window in windows} == {0}
    places = [(w.offset_bytes, w.offset_bytes + n) for w, n in zip(windows, sizes, strict=True)]
    assert places == list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))


def test_small_steps_are_fetched_while_a_large_one_waits_to_be_installed() -> None:
    """The quarter of headroom is what makes wire and install overlap in place."""
    windows = schedule([100, 10, 10, 100, 10], 125)
    assert [w.installed_before for w in windows] == [0, 0, 0, 1, 2]


# -- shardings --------------------------------------------------------------------------------


@st.composite
def shardings(draw: st.DrawFn) -> tuple[list[torch.Tensor], list[list[SourceBox]]]:
    """Tensors of any shape and dtype, cut on any axes, dealt to ranks with replicas and gaps."""
    ranks: list[list[SourceBox]] = [[] for _ in range(draw(st.integers(1, 4)))]
    tensors = []
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
        dtype = draw(st.sampled_from([torch.int8, torch.bfloat16, torch.float32, torch.float64]))
        data = random_bits(shape, dtype, seed=draw(st.integers(0, 1 << 16)))
        tensors.append(data)
        cuts = [
            sorted({0, extent, *draw(st.lists(st.integers(1, extent), max_size=2))})
            for extent in shape
        ]
        for box in itertools.product(*(itertools.pairwise(cut) for cut in cuts)):
            part = data[tuple(slice(*ends) for ends in box)]
            holders = draw(st.sets(st.integers(0, len(ranks) - 1), min_size=1))
            for holder in sorted(holders):
                ranks[holder].append(
                    SourceBox(
                        name=f"t{number}",
                        global_shape=shape,
                        start=tuple(first for first, _ in box),
                        data=draw(st.sampled_from(HELD))(part),
                    )
                )
    return tensors, ranks


def _within_wider_rows(part: torch.Tensor) -> torch.Tensor:
    """The part as columns of a wider buffer: gaps between its rows."""
    if not part.ndim:
        return part.clone()
    wide = part.new_zeros((*part.shape[:-1], part.shape[-1] + 3))
    view = wide[..., 2:-1]
    view.copy_(part)
    return view


HELD: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda part: part.clone(memory_format=torch.contiguous_format),
    lambda part: part,
    _within_wider_rows,
]
"""How a rank may hold its part: by itself, inside the whole, or with gaps between rows."""


@settings(max_examples=150, deadline=None)
@given(case=shardings(), one_step=st.booleans())
def test_any_sharding_lands_bit_for_bit(
    case: tuple[list[torch.Tensor], list[list[SourceBox]]], one_step: bool
) -> None:
    """Rows, columns, blocks, replicas, scalars, strided holders; every byte written once."""
    tensors, ranks = case
    with offered_boxes(*[rank for rank in ranks if rank]) as made:
        manifests = [rank.manifest for rank in made]
        wanted = [tensor_of(f"t{number}", data) for number, data in enumerate(tensors)]
        assert {t.name: t for t in logical_tensors(manifests)} == {t.name: t for t in wanted}
        steps: list[tuple[list[str], list[LogicalTensor]]] = (
            [(["all"], wanted)] if one_step else [([t.name], [t]) for t in wanted]
        )
        plan = build_plan(manifests, steps)
        landed = carry_out(plan)
    for number, data in enumerate(tensors):
        assert same_bits(landed[f"t{number}"], data)
    assert sum(step.bytes_to_move for step in plan.steps) == sum(t.nbytes for t in wanted)


@given(shardings(), st.data())
def test_only_what_is_needed_is_fetched(
    case: tuple[list[torch.Tensor], list[list[SourceBox]]], data: st.DataObject
) -> None:
    """Any boxes of any tensors, whatever the sharding at the source; the rest stays as it was."""
    tensors, ranks = case
    needed = {f"t{number}": data.draw(grids(tensor.shape)) for number, tensor in enumerate(tensors)}
    with offered_boxes(*[rank for rank in ranks if rank]) as made:
        wanted = [tensor_of(f"t{number}", tensor) for number, tensor in enumerate(tensors)]
        plan = build_plan([rank.manifest for rank in made], [(["all"], wanted)], needed)
        landed = carry_out(plan, needed)
    for number, tensor in enumerate(tensors):
        for start, extent in needed[f"t{number}"]:
            part = tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))
            assert same_bits(landed[f"t{number}"][part], tensor[part])
    sizes = {f"t{number}": tensor.itemsize for number, tensor in enumerate(tensors)}
    (step,) = plan.steps
    assert step.bytes_needed == sum(
        prod(extent) * sizes[name] for name, boxes in needed.items() for _, extent in boxes
    )
    assert step.bytes_to_move >= step.bytes_needed


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Some cells of a grid over a tensor."""
    cuts = [
        sorted({0, extent, *draw(st.lists(st.integers(1, extent), max_size=2))}) for extent in shape
    ]
    cells = list(itertools.product(*(itertools.pairwise(cut) for cut in cuts)))
    chosen = draw(st.lists(st.sampled_from(cells), unique=True)) if cells else []
    return [
        (tuple(first for first, _ in cell), tuple(last - first for first, last in cell))
        for cell in chosen
    ]


def columns(name: str, data: torch.Tensor, parts: int) -> list[list[SourceBox]]:
    """A matrix cut by columns, one contiguous shard on each of `parts` ranks."""
    width = data.shape[1] // parts
    return [
        [
            SourceBox(
                name=name,
                global_shape=tuple(data.shape),
                start=(0, rank * width),
                data=data[:, rank * width : (rank + 1) * width].clone(),
            )
        ]
        for rank in range(parts)
    ]


def test_short_rows_travel_as_whole_blocks_through_a_bounded_scratch_area() -> None:
    """A column shard of 2048 rows is a few reads, not 2048, and every batch fits the scratch."""
    data = torch.randn(2048, 96)
    with offered_boxes(*columns("down", data, 2)) as made:
        plan = build_plan([r.manifest for r in made], [(["m"], [tensor_of("down", data)])])
        landed = carry_out(plan)
    (step,) = plan.steps
    assert torch.equal(landed["down"], data)
    assert not step.reads
    assert step.operations == sum(map(len, step.packed)) <= 10
    assert step.bytes_to_move == data.nbytes
    assert 0 < plan.scratch_bytes <= plan.largest_step_bytes // 4
    for batch in step.packed:
        assert sum(piece.nbytes for piece in batch) <= plan.scratch_bytes


@pytest.mark.parametrize(
    ("columns_of_it", "whole_rows"), [(96, True), (3 * SHORT_RUN_BYTES, False)]
)
def test_short_runs_are_fetched_with_their_rows_while_the_rest_of_a_row_is_short_too(
    columns_of_it: int, whole_rows: bool
) -> None:
    """Half the columns of a matrix: twice the bytes in few reads, or the bytes alone in many."""
    data = torch.randn(64, columns_of_it)
    needed = {"down": [((0, 0), (64, 48))]}
    with offered_boxes(*columns("down", data, 1)) as made:
        steps = [(["m"], [tensor_of("down", data)])]
        plan = build_plan([r.manifest for r in made], steps, needed)
        landed = carry_out(plan, needed)
    (step,) = plan.steps
    assert torch.equal(landed["down"][:, :48], data[:, :48])
    assert step.bytes_needed == 64 * 48 * 4
    assert step.bytes_to_move == (data.nbytes if whole_rows else step.bytes_needed)
    assert (step.operations == 64) == (not whole_rows)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_short_rows_of_any_axis_are_packed_bit_for_bit(data: st.DataObject) -> None:
    """Fused experts cut along any axes, read by columns: pieces begin anywhere, and fit."""
    shape = tuple(data.draw(st.integers(1, most)) for most in (5, 24, 48))
    tensor = random_bits(shape, torch.float32, seed=data.draw(st.integers(0, 99)))
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(1, n), max_size=2))}) for n in shape]
    cells = list(itertools.product(*(itertools.pairwise(cut) for cut in cuts)))
    ranks = [
        [
            SourceBox(
                name="w",
                global_shape=shape,
                start=tuple(first for first, _ in cell),
                data=tensor[tuple(slice(*ends) for ends in cell)].clone(),
            )
        ]
        for cell in cells
    ]
    needed = {"w": data.draw(grids(shape))}
    other = torch.zeros(data.draw(st.sampled_from([1, 4096])))  # the scratch area is by its size
    with offered_boxes(*ranks, [whole("other", other)]) as made:
        wanted = [tensor_of("w", tensor), tensor_of("other", other)]
        plan = build_plan([rank.manifest for rank in made], [(["all"], wanted)], needed)
        landed = carry_out(plan, needed)
        apart = carry_out(laid_apart(plan), needed)
    for start, extent in needed["w"]:
        part = tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))
        assert same_bits(landed["w"][part], tensor[part])
        assert same_bits(apart["w"][part], tensor[part])


def test_columns_of_fused_experts_are_blocks_of_each_expert() -> None:
    """Half the columns of 8 experts of 64 rows: a block for each, not a read for each row."""
    experts = torch.randn(8, 64, 96)
    needed = {"down": [((0, 0, 0), (8, 64, 48))]}
    with offered_boxes([whole("down", experts), whole("other", torch.zeros(64_000))]) as (rank,):
        wanted = [
            tensor_of("down", experts),
            LogicalTensor(name="other", shape=(64_000,), dtype=torch.float32),
        ]
        plan = build_plan([rank.manifest], [(["m"], wanted)], needed)
        landed = carry_out(plan, needed)
    (step,) = plan.steps
    assert torch.equal(landed["down"][:, :, :48], experts[:, :, :48])
    assert step.operations <= 8 + 1


def test_long_rows_go_straight_into_place() -> None:
    """Rows as long as a descriptor is worth need no second copy."""
    data = torch.randn(6, 2 * SHORT_RUN_BYTES // 4)
    with offered_boxes(*columns("down", data, 2)) as made:
        plan = build_plan([r.manifest for r in made], [(["m"], [tensor_of("down", data)])])
        landed = carry_out(plan)
    (step,) = plan.steps
    assert torch.equal(landed["down"], data)
    assert not step.packed
    assert step.operations == 12


def test_rows_that_lie_apart_at_the_source_are_read_one_by_one() -> None:
    """A view with gaps is no block; reading it as one would fetch the gaps."""
    fused = torch.randn(40, 64)
    view = fused[:, 8:24]
    box = SourceBox(name="up", global_shape=(40, 16), start=(0, 0), data=view)
    with offered_boxes([box]) as (rank,):
        plan = build_plan([rank.manifest], [(["m"], [tensor_of("up", view)])])
        assert torch.equal(carry_out(plan)["up"], view)
    assert plan.steps[0].operations == 40
    assert plan.steps[0].bytes_to_move == view.nbytes


def test_neighbouring_runs_merge() -> None:
    """A contiguous tensor is one descriptor, whatever its number of axes."""
    data = torch.randn(3, 5, 7, 2)
    with offered_boxes([whole("w", data)]) as (rank,):
        plan = build_plan([rank.manifest], [(["m"], [tensor_of("w", data)])])
        assert torch.equal(carry_out(plan)["w"], data)
    assert plan.steps[0].operations == 1


def test_a_scalar_is_a_tensor_like_any_other() -> None:
    """No axes: one element, one descriptor, also where several ranks hold it."""
    with offered_boxes(*[[whole("scale", torch.tensor(2.5))] for _ in range(3)]) as made:
        wanted = LogicalTensor(name="scale", shape=(), dtype=torch.float32)
        plan = build_plan([r.manifest for r in made], [(["m"], [wanted])])
        assert carry_out(plan)["scale"].item() == 2.5
    assert plan.steps[0].bytes_to_move == 4


def test_replicas_are_read_evenly() -> None:
    """Four ranks hold all 37 tensors: no rank gives more than one tensor above another."""
    sizes = [random.Random(7).randint(1, 5000) for _ in range(37)]
    tensors = {f"t{n}": torch.randn(size) for n, size in enumerate(sizes)}
    replica = [whole(name, data) for name, data in tensors.items()]
    with offered_boxes(replica, replica, replica, replica) as made:
        steps = [([name], [tensor_of(name, data)]) for name, data in tensors.items()]
        plan = build_plan([r.manifest for r in made], steps)
        landed = carry_out(plan)
    assert all(torch.equal(landed[name], data) for name, data in tensors.items())
    given_by = [0] * 4
    for step in plan.steps:
        for read in step.reads:
            given_by[read.source] += int(read.descriptors[:, 2].sum())
    assert sum(given_by) == sum(sizes) * 4
    assert max(given_by) - min(given_by) <= 4 * max(sizes)


# -- what is refused --------------------------------------------------------------------------


def planned(shape: Sequence[int], *boxes: Box) -> FetchPlan:
    """Plan one tensor from boxes that each lie on a rank of their own."""
    ranks = [
        [
            SourceBox(
                name="model.w", global_shape=tuple(shape), start=start, data=torch.zeros(extent)
            )
        ]
        for start, extent in boxes
    ]
    wanted = LogicalTensor(name="model.w", shape=tuple(shape), dtype=torch.float32)
    with offered_boxes(*ranks) as made:
        return build_plan([r.manifest for r in made], [(["m"], [wanted])])


def test_a_gap_is_an_error_that_names_tensor_and_boxes() -> None:
    """What nobody offers would be served as whatever the buffer held before."""
    with pytest.raises(PlanError, match=r"model\.w: .* 24 of 32 elements .*\[0:4, 0:4\]"):
        planned((4, 8), ((0, 0), (4, 4)), ((0, 6), (4, 2)))


def test_an_overlap_is_an_error_that_names_tensor_and_boxes() -> None:
    """Two ranks that both claim an element may differ in it."""
    with pytest.raises(PlanError, match=r"model\.w: .*\[0:4, 0:5\] and \[0:4, 4:8\] overlap"):
        planned((4, 8), ((0, 0), (4, 5)), ((0, 4), (4, 4)))


def test_a_tensor_that_nobody_offers_is_an_error() -> None:
    """It cannot come from nowhere."""
    wanted = LogicalTensor(name="absent", shape=(2,), dtype=torch.float32)
    with offered_boxes([whole("w", torch.zeros(2))]) as (rank,), pytest.raises(PlanError) as error:
        build_plan([rank.manifest], [(["m"], [wanted])])
    assert "absent" in error.value.message


@pytest.mark.parametrize("other", [torch.zeros(4, 3), torch.zeros(3, 4, dtype=torch.bfloat16)])
def test_ranks_that_disagree_are_named(other: torch.Tensor) -> None:
    """Another shape or another dtype of one tensor: both ranks and both facts are told."""
    first = whole("w", torch.zeros(3, 4))
    with offered_boxes([first], [whole("w", other)]) as made, pytest.raises(PlanError) as error:
        logical_tensors([r.manifest for r in made])
    text = error.value.message
    assert text.startswith("w: trainer rank 0 says (3, 4) torch.float32, trainer rank 1 says")
    assert f"{tuple(other.shape)} {other.dtype}" in text


@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=40))
def test_small_neighbours_travel_together_and_nothing_else_changes(sizes: list[int]) -> None:
    """Modules and tensors keep their order; no joined step outgrows a quarter of the largest."""
    steps = [
        (
            [f"module{index}"],
            [LogicalTensor(name=f"t{index}", shape=(size,), dtype=torch.float32)],
        )
        for index, size in enumerate(sizes)
    ]
    joined = coalesced(steps)
    flat = itertools.chain.from_iterable
    assert list(flat(modules for modules, _ in joined)) == list(flat(m for m, _ in steps))
    assert list(flat(tensors for _, tensors in joined)) == list(flat(t for _, t in steps))
    for modules, tensors in joined:
        if len(modules) > 1:
            assert sum(tensor.nbytes for tensor in tensors) <= 4 * max(sizes) // 4


def test_norms_between_matrices_cost_no_trip_of_their_own() -> None:
    """As in a transformer: two norms ride with each other, matrices stay steps."""
    sizes = {"norm0": 8, "norm1": 8, "qkv": 3000, "norm2": 8, "mlp": 9000}
    steps = [
        ([name], [LogicalTensor(name=name, shape=(size,), dtype=torch.float32)])
        for name, size in sizes.items()
    ]
    assert [modules for modules, _ in coalesced(steps)] == [
        ["norm0", "norm1"],
        ["qkv"],
        ["norm2"],
        ["mlp"],
    ]
