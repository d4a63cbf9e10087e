"""The design of `make chaos-update` covers what it says it covers."""

from __future__ import annotations

import itertools
from dataclasses import asdict, fields

import pytest

from tests.chaos_update.cases import MAX_CASES, PHASES_OF, Case, cases, part_of, servers

FOUND = cases()


def test_there_are_few_and_always_the_same() -> None:
    """The table names cases by their numbers."""
    assert len(FOUND) <= MAX_CASES
    assert len(set(FOUND)) == len(FOUND)
    assert cases() == FOUND


def test_every_fault_meets_every_phase_where_it_makes_sense() -> None:
    """The pairs that matter most."""
    wanted = {(fault, phase) for fault, phases in PHASES_OF.items() for phase in phases}
    assert {(case.fault, case.phase) for case in FOUND} == wanted


@pytest.mark.parametrize(
    ("one", "other"), list(itertools.combinations([field.name for field in fields(Case)], 2))
)
def test_every_pair_of_values_is_there(one: str, other: str) -> None:
    """Of any two factors; but where a phase or a fault, or two phases, leave no choice."""
    values = [{asdict(case)[name] for case in FOUND} for name in (one, other)]
    there = {(asdict(case)[one], asdict(case)[other]) for case in FOUND}
    for pair in set(itertools.product(*values)) - there:
        assert {one, other} <= {"mode", "commit", "phase", "fault"}, pair
        assert {one, other} != {"mode", "fault"}, pair


def test_servers_are_few() -> None:
    """Each is started for half a minute."""
    assert len(servers()) <= 8
    places = [case.server for case in FOUND]
    assert len(list(itertools.groupby(places))) == len(set(places)), "each is started once"


def test_parts_are_all_of_it() -> None:
    """None is left out, none comes twice."""
    parts = [part_of(FOUND, part, 4) for part in range(1, 5)]
    assert [case for part in parts for _, case in part] == FOUND
    assert [number for part in parts for number, _ in part] == list(range(1, len(FOUND) + 1))
    with pytest.raises(ValueError, match="part 5 of 4"):
        part_of(FOUND, 5, 4)
