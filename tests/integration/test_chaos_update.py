"""A few cases of `make chaos-update` on each engine: those that once served wrong answers.

In bfloat16: the contract suite's servers are those of float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos_update.cases import Case
from tests.chaos_update.episode import run_case
from tests.chaos_update.fleet import Fleet
from tests.chaos_update.models import Models
from tests.support.engines import Engine, engine_parameters, real_engines_here

ONE, TWO = "one", "two"


@pytest.fixture(
    scope="module",
    params=engine_parameters(real_engines_here()),
)
def real_engine(request: pytest.FixtureRequest) -> Engine:
    """Every real engine of this environment."""
    return request.param


@pytest.fixture(scope="module")
def fleet(real_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One server, which all cases share; each leaves it alive."""
    folder = tmp_path_factory.mktemp("fleet")
    fleet = Fleet(Models(folder / "models"), folder)
    yield fleet
    fleet.close()


@pytest.mark.parametrize(
    ("mode", "commit", "phase", "fault"),
    [
        ("staged", ONE, "pull", "proxy_504"),
        ("in_place", ONE, "pull", "trainer_killed"),
        ("in_place", ONE, "pull", "deadline_50ms"),
        ("staged", TWO, "pull", "left_by_ctrl_c"),
    ],
)
def test_no_wrong_answer_and_no_lying_version(
    fleet: Fleet,
    real_engine: Engine,
    tmp_path_factory: pytest.TempPathFactory,
    mode: str,
    commit: str,
    phase: str,
    fault: str,
) -> None:
    """Under load, whatever the trainer does next; a good update repairs what lives."""
    case = Case(
        engine=real_engine.kind,
        tensor_parallel=1,
        api_servers=2,
        wire="tcp",
        dtype="bfloat16",
        mode=mode,
        commit=commit,
        phase=phase,
        fault=fault,
    )
    result = run_case(case, fleet, tmp_path_factory.mktemp("case"))
    assert result.reached, result
    assert (result.wrong, result.lying, result.end) == (0, 0, "repaired"), result
    assert result.answers > 3, "clients asked all the time"
    assert fleet.started == 1, "the engine lived"
