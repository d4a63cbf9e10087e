"""Servers that tests share, and the order in which a run of the tests needs them.

A test names configurations with `on` (`tests.support.configurations`) and asks for `served` or
`server`; with `only` beside it, it runs on some engines alone. Of one engine and one configuration
the whole run has one server: the tests that name it follow each other, whatever folders they are
in, at the place of the first of them. It starts with the first, and ends after the last. So it must
serve when a test has ended; `Served.restore` puts it right. A test that kills its server starts one
of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from tests.support.engine_server import EngineServer
from tests.support.engines import IN_MEMORY, Engine, engine_parameters, engines_here
from tests.support.served import Served, ServerPool
from tests.support.stepping import Steps

_POOL = pytest.StashKey[ServerPool]()


@pytest.fixture(params=engine_parameters(engines_here()))
def engine(request: pytest.FixtureRequest) -> Engine:
    """Every engine of this environment in turn."""
    return request.param


@pytest.fixture(scope="session")
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerPool]:
    """The server that runs."""
    pool = request.config.stash[_POOL] = ServerPool(lambda: tmp_path_factory.mktemp("server"))
    yield pool
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Move the tests of a server to the first of them, and leave out those that have none."""
    left_out = [item for item in items if not _has_server(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = in_order(item for item in items if _has_server(item))


def in_order(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Each test of a server at the place of the first of them."""
    found = list(items)
    first: dict[object, int] = {}
    for place, item in enumerate(found):
        first.setdefault(_server_of(item) or item, place)
    return sorted(found, key=lambda item: first[_server_of(item) or item])


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End a server after its last test: the next one may need the cores.

    Last of all, since fixtures put the server back as it was.
    """
    pool = item.config.stash.get(_POOL, None)
    if pool is not None and (nextitem is None or _server_of(nextitem) != _server_of(item)):
        pool.close()


def _has_server(item: pytest.Item) -> bool:
    """Some configurations are those of the engine in memory alone."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    if _server_of(item) is None:
        return True
    return bool(params["served"].real or params["engine"] is IN_MEMORY)


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
