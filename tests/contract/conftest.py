"""One suite over every engine that this environment has, and servers shared between its tests."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.configurations import NEW
from tests.support.engine_server import EngineServer
from tests.support.engines import Engine, engines_here
from tests.support.served import TCP, Served, ServerPool
from tests.support.stepping import Steps
from tests.support.trainer_process import TrainerPool, TrainerProcess


@pytest.fixture(
    params=[
        pytest.param(each, id=each.kind, marks=[pytest.mark.engine] * (each.kind != "in_memory"))
        for each in engines_here()
    ]
)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Every engine in turn."""
    return request.param


_POOL = pytest.StashKey[ServerPool]()


@pytest.fixture(scope="session")
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerPool]:
    """The server that runs."""
    pool = request.config.stash[_POOL] = ServerPool(lambda: tmp_path_factory.mktemp("server"))
    yield pool
    pool.close()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the server after the suite's last test: what comes next starts servers of its own.

    Last of all, since fixtures put the server back as it was.
    """
    suite = Path(__file__).parent
    if nextitem is None or suite not in nextitem.path.parents:
        pool = item.config.stash.get(_POOL, None)
        if pool is not None:
            pool.close()


@pytest.fixture
def served(request: pytest.FixtureRequest, engine: Engine, servers: ServerPool) -> Served:
    """The server of the test's configuration; see `tests.support.configurations.on`."""
    return servers.served(engine, request.param)


@pytest.fixture
def server(served: Served) -> EngineServer:
    """The same, as its clients see it."""
    return served.server


@pytest.fixture
def steps(served: Served) -> Iterator[Steps]:
    """What holds or fails the server's installs."""
    yield served.steps
    served.steps.clear()


@pytest.fixture(scope="session")
def trainers() -> Iterator[TrainerPool]:
    """Trainer processes: one lasts until a test has hurt it."""
    pool = TrainerPool()
    yield pool
    pool.close()


@pytest.fixture
def trainer(trainers: TrainerPool) -> Iterator[TrainerProcess]:
    """A trainer in a process of its own, over tcp, that offers the new weights."""
    trainer = trainers.unharmed(NEW.folder, **TCP)
    yield trainer
    if not trainer.unharmed:
        trainer.end()


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    """For calls that take long."""
    with ThreadPoolExecutor(6) as pool:
        yield pool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one engine and one configuration follow each other: each server starts once."""
    places = [place for place, item in enumerate(items) if _server_of(item) is not None]
    order = {key: rank for rank, key in enumerate(dict.fromkeys(_server_of(i) for i in items))}
    ours = sorted((items[place] for place in places), key=lambda item: order[_server_of(item)])
    for place, item in zip(places, ours, strict=True):
        items[place] = item


def _server_of(item: pytest.Item) -> tuple[str, str] | None:
    params = getattr(getattr(item, "callspec", None), "params", {})
    if "served" not in params or "engine" not in params:
        return None
    return params["engine"].kind, params["served"].name


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show the server's last words with a failure."""
    outcome: Any = yield
    report = outcome.get_result()
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(server, EngineServer) and server.log.exists():
        report.sections.append(("end of the server's log", server.log_tail()))
