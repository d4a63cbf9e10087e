"""Whose bytes a rank reads where several sources hold the same box."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_plugins.errors import PlanError, SettingsError
from engine_plugins.settings import SOURCE_POLICIES
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.planning.box_table import Column, TensorTable
from engine_plugins.weights.planning.source_choice import Reader, SourceChoice, balanced
from engine_plugins.weights.planning.source_table import SourceTable, source_table
from tests.support.source_ranks import offered_boxes, tensor_of, whole

WEIGHT = torch.arange(24.0).view(4, 6)
LOWER, UPPER = (
    SourceBox(name="w", global_shape=(4, 6), start=(row, 0), data=WEIGHT[row : row + 2])
    for row in (0, 2)
)


@contextmanager
def placed(*ranks: Sequence[SourceBox], hosts: str = "") -> Iterator[list[SourceManifest]]:
    """Manifests of ranks on hosts of one letter each."""
    with offered_boxes(*ranks) as made:
        yield [
            msgspec.structs.replace(
                rank.manifest, global_rank=number, host=hosts[number : number + 1]
            )
            for number, rank in enumerate(made)
        ]


def read_from(reader: Reader, manifests: Sequence[SourceManifest], nbytes: Sequence[int]) -> Column:
    """The sources that are chosen for every distinct box in turn, of so many bytes."""
    tensors = TensorTable([tensor_of("w", WEIGHT)])
    sources: SourceTable = source_table(manifests, tensors)
    choice = SourceChoice(reader=reader, manifests=manifests)
    boxes = np.arange(len(nbytes)) % len(sources.distinct)
    source, row = choice.of(sources, tensors, boxes, np.array(nbytes))
    for number, own, box in zip(source.tolist(), row.tolist(), boxes.tolist(), strict=True):
        offered = manifests[number].box(own)
        assert offered.start == tuple(sources.distinct.start[box].tolist())
        assert offered.shape == tuple(sources.distinct.shape[box].tolist())
    return source


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 5), min_size=1).map(sorted), st.integers(1, 50)),
        max_size=20,
    )
)
def test_the_least_loaded_source_gives(boxes: list[tuple[list[int], int]]) -> None:
    """The rule itself, box by box: what one source alone has counts first."""
    first = np.cumsum([0, *(len(sources) for sources, _ in boxes)])
    source = np.array([one for sources, _ in boxes for one in sources], np.int64)
    nbytes = np.array([size for _, size in boxes], np.int64)
    load = [0] * 6
    for sources, size in boxes:
        if len(sources) == 1:
            load[sources[0]] += size
    expected = []
    for sources, size in boxes:
        place = min(range(len(sources)), key=lambda each: load[sources[each]])
        expected.append(place)
        if len(sources) > 1:
            load[sources[place]] += size

    chosen = balanced(first, source, np.arange(len(boxes)), nbytes)

    assert (chosen - first[:-1]).tolist() == expected


def test_nearest_reads_on_its_own_host_and_evenly_there() -> None:
    """Four replicas, two of them here: these two give all, in equal parts."""
    replica = [whole("w", WEIGHT)]
    with placed(replica, replica, replica, replica, hosts="abba") as manifests:
        chosen = read_from(Reader(policy="nearest", host="b"), manifests, [8] * 10)
        assert np.bincount(chosen, minlength=4).tolist() == [0, 5, 5, 0]


def test_nearest_reads_from_afar_what_is_not_here() -> None:
    """One half is on this host, the other on two others: these share it."""
    ranks = [[LOWER, UPPER], [LOWER], [UPPER], [LOWER]]
    with placed(*ranks, hosts="abca") as manifests:
        chosen = read_from(Reader(policy="nearest", host="b"), manifests, [4] * 8)
    assert set(chosen[::2].tolist()) == {1}
    assert np.bincount(chosen[1::2], minlength=4).tolist() == [2, 0, 2, 0]


def test_a_host_that_nobody_names_is_near_to_nobody() -> None:
    """Empty names are not one host."""
    replica = [whole("w", WEIGHT)]
    with placed(replica, replica, hosts="") as manifests:
        chosen = read_from(Reader(policy="nearest"), manifests, [8] * 4)
    assert np.bincount(chosen).tolist() == [2, 2]


def test_same_rank_reads_along_its_own_rail() -> None:
    """Rank 1 of 2 reads from ranks 1, 3 and 5 alone, evenly."""
    replica = [whole("w", WEIGHT)]
    with placed(*[replica] * 6) as manifests:
        reader = Reader(policy="same_rank", tp_rank=1, tp_size=2)
        chosen = read_from(reader, manifests, [8] * 6)
    assert np.bincount(chosen, minlength=6).tolist() == [0, 2, 0, 2, 0, 2]


def test_what_no_source_of_the_rail_has_is_refused_by_tensor_and_rank() -> None:
    """The box, who has it, and what to do; a source that says no rank is on no rail."""
    reader = Reader(policy="same_rank", tp_rank=0, tp_size=2)
    with placed([LOWER], [UPPER]) as manifests:
        named = (
            r"w: rank 0 of 2 .*\(2, 0\) of shape \(2, 6\), which trainer rank 1 \(global rank 1\)"
        )
        with pytest.raises(PlanError, match=named) as caught:
            read_from(reader, manifests, [48, 48])
        assert "ENGINE_PLUGINS_SOURCE_POLICY" in caught.value.remedy
    with placed([LOWER, UPPER]) as manifests:
        silent = [msgspec.structs.replace(manifests[0], global_rank=None)]
        with pytest.raises(PlanError, match="global rank None"):
            read_from(reader, silent, [48, 48])


def test_only_what_is_read_must_be_in_reach() -> None:
    """A box that this rank does not need may lie on another rail."""
    with placed([LOWER], [UPPER]) as manifests:
        reader = Reader(policy="same_rank", tp_rank=0, tp_size=2)
        assert read_from(reader, manifests, [48]).tolist() == [0]


def test_nothing_to_read_needs_no_source() -> None:
    tensors = TensorTable([])
    choice = SourceChoice(reader=Reader(policy="nearest", host="a"), manifests=[])
    none = np.empty(0, np.int64)
    source, row = choice.of(source_table([], tensors), tensors, none, none)
    assert len(source) == len(row) == 0


def test_a_policy_that_does_not_exist_is_told_with_those_that_do() -> None:
    with pytest.raises(SettingsError, match=r"'closest'.*balanced, nearest, same_rank"):
        Reader(policy="closest")
    assert SOURCE_POLICIES == ("balanced", "nearest", "same_rank")
