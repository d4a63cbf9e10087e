"""Overlapping places are counted once, however they lie; beside sets of single elements."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugins.weights.loader.strided_cover import Place, distinct_numel


def elements(place: Place) -> set[int]:
    indices = itertools.product(*map(range, place.shape))
    return {
        place.offset + sum(i * s for i, s in zip(index, place.strides, strict=True))
        for index in indices
    }


def counted(*places: Place) -> int:
    return len(set().union(*map(elements, places)))


places = st.integers(0, 3).flatmap(
    lambda axes: st.builds(
        Place,
        st.integers(0, 40),
        st.tuples(*[st.integers(0, 4)] * axes),
        st.tuples(*[st.integers(0, 20)] * axes),
    )
)


@given(st.lists(places, max_size=6))
def test_any_places_count_as_their_elements(some: list[Place]) -> None:
    assert distinct_numel(some) == counted(*some)


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 4), max_size=6), st.permutations(range(2)))
def test_boxes_of_one_matrix_count_as_their_elements(
    boxes: list[tuple[int, int, int, int]], order: list[int]
) -> None:
    """Rows and columns, seen as the matrix or as its transpose."""
    some = []
    for row, column, rows, columns in boxes:
        shape, strides = (rows, columns), (10, 1)
        some.append(
            Place(row * 10 + column, *(tuple(each[a] for a in order) for each in (shape, strides)))
        )
    assert distinct_numel(some) == counted(*some)


@pytest.mark.parametrize(
    ("some", "numel"),
    [
        ([], 0),
        ([Place(5, (), ())], 1),
        ([Place(0, (1 << 20, 1 << 20), (1 << 20, 1))], 1 << 40),
        # Column slices of every expert's matrix, as where experts are held transposed.
        (
            [
                Place(half << 19, (128, 1 << 20, 1 << 19), (1 << 40, 1 << 20, 1))
                for half in range(2)
            ],
            1 << 47,
        ),
        # Every other row of each.
        (
            [Place(odd << 20, (1 << 19, 1 << 20), (1 << 21, 1)) for odd in range(2)],
            1 << 40,
        ),
    ],
)
def test_sizes_of_a_model_are_counted_without_being_walked(some: list[Place], numel: int) -> None:
    assert distinct_numel(some) == numel
