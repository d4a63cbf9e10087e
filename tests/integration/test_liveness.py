"""A few rows of `make liveness` on each engine: stuck states that once lasted until a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.liveness.episode import run_row
from tests.liveness.report import line
from tests.liveness.rows import Row, rows
from tests.liveness.servers import LiveFleet
from tests.support.engines import Engine, engine_parameters, real_engines_here


@pytest.fixture(
    scope="module",
    params=engine_parameters(real_engines_here()),
)
def real_engine(request: pytest.FixtureRequest) -> Engine:
    """Every real engine of this environment."""
    return request.param


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for models, logs and servers' temporary files."""
    return tmp_path_factory.mktemp("liveness")


@pytest.fixture(scope="module")
def fleet(real_engine: Engine, place: Path) -> Iterator[LiveFleet]:
    """One server for all rows; the last row kills it."""
    disk = place / f"disk-{real_engine.kind}"
    disk.mkdir()
    fleet = LiveFleet(place / real_engine.kind, disk)
    yield fleet
    fleet.close()


@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        ("trainer_killed", "prepared"),
        ("core_stopped", "install"),
        ("folder_deleted", "pull"),
        ("core_killed", "install"),
    ],
)
def test_a_stuck_state_ends(
    fleet: LiveFleet, real_engine: Engine, place: Path, fault: str, phase: str
) -> None:
    """The trainer is told in time, the culprit is named, and a good update repairs the engine.

    A server whose core was killed ends, and leaves nothing.
    """
    result = run_row(_row(real_engine.kind, fault, phase), fleet, place)
    told = "\n".join([line(result), *result.notes])
    found = list(result.violations())
    if result.gone_s is not None:  # tests beside this one take the processors: no limit of seconds
        found = [each for each in found if "had not ended" not in each]
    assert found == [], told


def _row(engine: str, fault: str, phase: str) -> Row:
    (found,) = [
        row
        for row in rows(engine)
        if (row.tensor_parallel, row.api_servers, row.fault, row.phase) == (1, 1, fault, phase)
    ]
    return found
