"""A machine that has run out: no disk, no descriptors, no runtime directory.

An installed version is neither lost nor reported as failed, an engine that nothing has touched
serves on, and the state is true. Limits of this process stand for a full disk and for used-up
descriptors; tests/liveness fills and uses them up for real, on live engines.
"""

from __future__ import annotations

import asyncio
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.admin_server import AdminServer
from tests.support.in_memory_model import hf_tensors
from tests.support.limits import NO_DESCRIPTORS, limited
from tests.support.source_ranks import SourceRank, offered_tensors

pytestmark = pytest.mark.anyio

MakeServer = Callable[..., AdminServer]
Shortage = Callable[[Path], AbstractContextManager[None]]
SLOW = 2e4


@contextmanager
def full_disk(runtime_dir: Path) -> Iterator[None]:
    """No file of this process may grow over 100 bytes."""
    with limited(resource.RLIMIT_FSIZE, 100):
        yield


@contextmanager
def no_descriptors(runtime_dir: Path) -> Iterator[None]:
    """Every new descriptor is over the limit."""
    with limited(resource.RLIMIT_NOFILE, NO_DESCRIPTORS):
        yield


@contextmanager
def no_directory(runtime_dir: Path) -> Iterator[None]:
    """A cleaner of temporary folders has been here."""
    shutil.rmtree(runtime_dir)
    yield


SHORTAGES = [full_disk, no_descriptors, no_directory]


@pytest.fixture
def trainer() -> Iterator[SourceRank]:
    with offered_tensors(hf_tensors(seed=1)) as made:
        yield made


def leftovers(runtime_dir: Path) -> list[Path]:
    return [*runtime_dir.rglob("*.tmp")]


@pytest.mark.parametrize("shortage", SHORTAGES)
@pytest.mark.parametrize("phase", ["pull", "install"])
async def test_an_update_under_way_ends_well(
    make_server: MakeServer,
    trainer: SourceRank,
    runtime_dir: Path,
    shortage: Shortage,
    phase: str,
) -> None:
    """Its answer is repeated, to any process, and the next one works in the same straits.

    Ranks may need a descriptor when one begins.
    """
    server = make_server()
    second = make_server(engine=server.engine)
    async with server.running(), second.http:
        plan_id = await server.plan(trainer.manifest)
        if phase == "pull":
            trainer.transport.bytes_per_s = SLOW
        else:
            server.engine.ranks[0].installer.install_s = 0.05
        asked = {"plan_id": plan_id, "version": 5, "request_id": "r", "mode": "staged"}
        running = asyncio.create_task(server.post("/weights/update", **asked))
        await server.until("updating", phase=phase)
        while server.engine.ranks[0].receiver._run is None:  # then its memory has been looked at
            assert not running.done(), running.result().text
            await asyncio.sleep(0.005)
        with shortage(runtime_dir):
            assert (await second.state())["update"]["version"] == 5
            answer = await running
            assert answer.status_code == 200, answer.text
            state = await second.state()
            assert (state["state"], state["weights"]["version"]) == ("serving", 5)
            for each in (server, second):
                again = await each.post("/weights/update", **asked)
                assert again.json() == answer.json()
            history = (await second.get("/weights")).json()
            assert [report["version"] for report in history["history"]] == [5]
            assert [plan["plan_id"] for plan in history["plans"]] == [plan_id]
            trainer.transport.bytes_per_s = None
            if shortage is not no_descriptors:
                following = await second.post("/weights/update", plan_id=plan_id, version=6)
                assert following.status_code == 200, following.text
            for path in ("/pause", "/resume", "/flush"):
                assert (await server.post(path)).status_code == 200
        assert server.engine.serves(seed=1)
    assert leftovers(runtime_dir) == []


@pytest.mark.parametrize("shortage", [full_disk, no_descriptors])
async def test_what_needs_a_file_is_refused_before_anything_begins(
    make_server: MakeServer, trainer: SourceRank, runtime_dir: Path, shortage: Shortage
) -> None:
    """The error names the directory and what to do; the engine is not asked."""
    server = make_server()
    async with server.running():
        await server.state()
        calls = list(server.engine.calls)
        with shortage(runtime_dir):
            answer = await server.publish(trainer.manifest)
            _is_explained(answer, runtime_dir)
            assert server.engine.calls == calls
        assert leftovers(runtime_dir) == []
        assert (await server.post("/pause")).status_code == 200
        assert await server.plan(trainer.manifest)


def _is_explained(answer: httpx.Response, runtime_dir: Path) -> None:
    told = answer.json()
    assert (answer.status_code, told["code"]) == (503, "server_files")
    assert str(runtime_dir) in told["detail"]
    assert "ulimit" in told["remedy"]
    assert told["state"] == "serving"


async def test_a_server_whose_directory_was_removed_is_connected_to_anew(
    make_server: MakeServer, trainer: SourceRank, runtime_dir: Path
) -> None:
    """Its trainer is told that the source is gone, and sends it again: the folders are made."""
    server = make_server()
    async with server.running():
        published = await server.publish(trainer.manifest)
        ids = [published.json()["source_id"]]
        shutil.rmtree(runtime_dir)
        gone = await server.post("/weights/connect", source_ids=ids)
        assert (gone.status_code, gone.json()["code"]) == (404, "unknown_id")
        plan_id = await server.plan(trainer.manifest)
        updated = await server.post("/weights/update", plan_id=plan_id, version=1)
        assert updated.status_code == 200
        assert server.engine.serves(seed=1)


async def test_an_update_without_descriptors_is_refused_with_what_to_do(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """By the rank that looked how much memory is free; the engine serves on, and updates later."""
    server = make_server(tp_size=2)
    async with server.running():
        plan_id = await server.plan(trainer.manifest)
        for path, version in (("update", 1), ("prepare", 2)):
            asked = {"plan_id": plan_id, "version": version, "mode": "staged"}
            with no_descriptors(Path()):
                refused = await server.post(f"/weights/{path}", **asked)
                assert (refused.status_code, refused.json()["code"]) == (503, "server_files")
                assert "rank 0" in refused.json()["detail"]
                assert "Too many open files" in refused.json()["detail"]
                assert "ulimit -n" in refused.json()["remedy"]
                state = await server.state()
                assert (state["state"], state["update"]) == ("serving", None)
        answer = await server.post("/weights/update", plan_id=plan_id, version=1)
        assert answer.status_code == 200
        assert server.engine.serves(seed=1)


@pytest.mark.parametrize("shortage", [full_disk, no_directory])
async def test_a_prepared_update_is_committed_or_given_up(
    make_server: MakeServer, trainer: SourceRank, runtime_dir: Path, shortage: Shortage
) -> None:
    """By another process than the one that prepared it."""
    server = make_server()
    second = make_server(engine=server.engine)
    async with server.running(), second.http:
        plan_id = await server.plan(trainer.manifest)
        with shortage(runtime_dir):
            for version, end in ((1, "/weights/abort"), (2, "/weights/commit")):
                asked = {"plan_id": plan_id, "version": version, "request_id": f"r{version}"}
                prepared = await server.post("/weights/prepare", **asked)
                assert prepared.status_code == 200, prepared.text
                ended = await second.post(end, request_id=f"r{version}")
                assert ended.status_code == 200, ended.text
                assert (await server.state())["state"] == "serving"
        assert (await server.state())["weights"]["version"] == 2
        assert server.engine.serves(seed=1)


@pytest.mark.parametrize("shortage", SHORTAGES)
async def test_a_prepared_update_is_committed_in_any_straits(
    make_server: MakeServer, trainer: SourceRank, runtime_dir: Path, shortage: Shortage
) -> None:
    """Every byte is here; what it takes is memory."""
    server = make_server()
    async with server.running():
        plan_id = await server.plan(trainer.manifest)
        asked = {"plan_id": plan_id, "version": 1, "request_id": "r"}
        assert (await server.post("/weights/prepare", **asked)).status_code == 200
        with shortage(runtime_dir):
            committed = await server.post("/weights/commit", request_id="r")
            assert committed.status_code == 200, committed.text
        assert server.engine.serves(seed=1)


@pytest.mark.parametrize("shortage", [full_disk, no_directory])
async def test_a_failure_in_the_install_still_fences(
    make_server: MakeServer, trainer: SourceRank, runtime_dir: Path, shortage: Shortage
) -> None:
    """And an update in the same straits repairs."""
    server = make_server()
    async with server.running():
        plan_id = await server.plan(trainer.manifest)
        installer = server.engine.ranks[0].installer
        right = installer.install

        def fails(*arguments: object) -> object:
            raise RuntimeError("no")

        installer.install = fails  # type: ignore[method-assign, assignment]
        with shortage(runtime_dir):
            failed = await server.post("/weights/update", plan_id=plan_id, version=1)
            assert failed.status_code == 500
            assert (await server.state())["state"] == "fenced"
            installer.install = right  # type: ignore[method-assign]
            repaired = await server.post("/weights/update", plan_id=plan_id, version=1)
            assert repaired.status_code == 200, repaired.text
        assert server.engine.serves(seed=1)
