"""What a loader reads of each tensor, found from the copies that it makes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import Interval
from engine_plugins.weights.loader.loader_trace import trace_loader
from engine_plugins.weights.loader.needed import needed_boxes

Read = Callable[[torch.Tensor], torch.Tensor]


def boxes_of(shape: tuple[int, ...], *reads: Read) -> tuple[Interval, ...]:
    """The boxes that a loader needs which copies these views of a tensor into parameters."""
    parameters = {
        str(number): torch.empty(read(torch.empty(shape)).shape, device="meta")
        for number, read in enumerate(reads)
    }

    def load(weights: object) -> None:
        for _, weight in weights:  # type: ignore[attr-defined]
            for number, read in enumerate(reads):
                parameters[str(number)].copy_(read(weight))

    tensors = [LogicalTensor(name="w", shape=shape, dtype=torch.float32)]
    return needed_boxes(trace_loader(parameters, load, tensors), tensors)["w"]


def elements(shape: tuple[int, ...], boxes: tuple[Interval, ...]) -> list[int]:
    """Every element in the boxes, by its number in the tensor, as often as it is in one."""
    numbers = torch.arange(prod(shape)).view(shape)
    found: list[int] = []
    for start, extent in boxes:
        found += (
            numbers[tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))]
            .flatten()
            .tolist()
        )
    return sorted(found)


@pytest.mark.parametrize(
    ("read", "boxes"),
    [
        (lambda w: w, [((0, 0), (8, 6))]),
        (lambda w: w.narrow(0, 4, 4), [((4, 0), (4, 6))]),
        (lambda w: w.chunk(2, dim=1)[1], [((0, 3), (8, 3))]),
        (lambda w: w.t()[1:3], [((0, 1), (8, 2))]),
        (lambda w: w[5], [((5, 0), (1, 6))]),
        (lambda w: w.view(2, 4, 6)[1], [((4, 0), (4, 6))]),
        (lambda w: w[1::2], [((1, 0), (7, 6))]),
        (lambda w: w.flatten()[6:18], [((0, 0), (8, 6))]),
        (lambda w: w.to(torch.bfloat16), [((0, 0), (8, 6))]),
        (lambda w: w[2:4].clone(), [((0, 0), (8, 6))]),
        (lambda w: w[:0], []),
    ],
)
def test_a_view_is_the_box_that_it_walks(read: Read, boxes: list[Interval]) -> None:
    """A view that wraps around rows, and whatever is computed first, needs the whole tensor."""
    assert list(boxes_of((8, 6), read)) == boxes


def test_copies_of_one_tensor_add_up() -> None:
    """Parts that lie apart stay apart; those that overlap are fetched once."""
    apart = boxes_of((8, 6), lambda w: w[:2], lambda w: w[6:])
    assert apart == (((0, 0), (2, 6)), ((6, 0), (2, 6)))
    assert boxes_of((8, 6), lambda w: w[:4], lambda w: w[2:6], lambda w: w[:4]) == (
        ((0, 0), (6, 6)),
    )


@st.composite
def walks(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Read]]:
    """A shape and some views of it: cuts, steps, swapped and split axes in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))

    def walk() -> Read:
        steps: list[tuple[str, int, int, int]] = draw(
            st.lists(
                st.tuples(
                    st.sampled_from(["cut", "step", "swap", "split", "flat"]),
                    st.integers(0, 3),
                    st.integers(0, 6),
                    st.integers(1, 6),
                ),
                max_size=4,
            )
        )

        def read(w: torch.Tensor) -> torch.Tensor:
            for kind, axis, first, size in steps:
                axis %= max(w.dim(), 1)
                extent = w.shape[axis]
                if kind == "cut":
                    w = w.narrow(
                        axis, min(first, extent - 1), min(size, extent - min(first, extent - 1))
                    )
                elif kind == "step":
                    w = w[(slice(None),) * axis + (slice(min(first, extent - 1), None, size),)]
                elif kind == "swap":
                    w = w.transpose(axis, 0)
                elif kind == "split" and extent % size == 0:
                    w = w.unflatten(axis, (size, extent // size))
                elif kind == "flat" and w.is_contiguous():
                    w = w.view(-1)
            return w

        return read

    return shape, [walk() for _ in range(draw(st.integers(1, 3)))]


@given(walks())
def test_all_that_is_read_is_needed_once_and_nothing_outside(
    case: tuple[tuple[int, ...], list[Read]],
) -> None:
    """Whatever views a loader takes: no element that it reads is left out or counted twice."""
    shape, reads = case
    needed = elements(shape, boxes_of(shape, *reads))
    assert len(needed) == len(set(needed))
    numbers = torch.arange(prod(shape)).view(shape)
    read = {number for walk in reads for number in walk(numbers).flatten().tolist()}
    assert read <= set(needed)
