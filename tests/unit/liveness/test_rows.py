"""The rows of `make liveness` are those that its document promises."""

from __future__ import annotations

import itertools

import pytest

from tests.liveness.rows import rows
from tests.support.environments import ENGINES


@pytest.mark.parametrize("engine", ENGINES)
def test_no_row_is_there_twice_and_servers_are_shared(engine: str) -> None:
    """Rows of one server follow each other; those that end it come last."""
    found = rows(engine)
    assert len(set(found)) == len(found)
    servers = [row.server for row in found]
    changes = sum(a != b for a, b in itertools.pairwise(servers))
    assert changes == len(set(servers)) - 1
    for server in set(servers):
        ends = [row.ends_server for row in found if row.server == server]
        assert ends == sorted(ends)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", ["worker_stopped", "worker_killed"])
def test_a_rank_is_hurt_in_every_phase(engine: str, fault: str) -> None:
    """With two ranks, so that one still answers."""
    found = rows(engine)
    phases = {row.phase for row in found if row.fault == fault and row.tensor_parallel == 2}
    assert phases >= {"pull", "pause", "install", "prepared"}
