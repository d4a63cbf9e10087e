"""Where ranks of a pull stand, by their pages alone, and a rank that will never tell again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from engine_plugins.admin import pull_watch
from engine_plugins.admin.pull_watch import PullWatch
from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.errors import EngineCallError, PeerLostError
from engine_plugins.shared_page import SharedPage
from engine_plugins.weights.receiving.worker_messages import (
    Failure,
    PullNote,
    StatusAnswer,
)
from tests.support.in_memory_engine import InMemoryEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
def engine() -> Iterator[InMemoryEngine]:
    made = InMemoryEngine()
    yield made
    made.close()


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "tp0.page"
    SharedPage.create(path, nbytes=64 << 10)
    return path


def status(page: Path, *, number: int = 1, done: int = 0, pid: int | None = None) -> StatusAnswer:
    return StatusAnswer(
        tp_rank=0,
        steps_installed=0,
        steps_total=3,
        bytes_done=done,
        bytes_total=9,
        may_begin=done == 9,
        failure=None,
        note=PullNote(page=str(page), number=number, pid=pid or os.getpid()),
    )


def tell(page: Path, told: StatusAnswer) -> None:
    SharedPage(page).write(msgspec.msgpack.encode(told))


async def test_the_newest_word_of_this_pull_counts(engine: InMemoryEngine, page: Path) -> None:
    """And none of the pull before, whose last word is on the page when this one begins."""
    tell(page, status(page, number=1, done=9))
    began = status(page, number=2)
    watch = PullWatch(WorkerCalls(engine), [began])
    assert await watch.look() == [began]
    for done in (4, 9):
        newer = status(page, number=2, done=done)
        tell(page, newer)
        assert await watch.look() == [newer]
        assert await watch.look() == [newer]
    assert engine.calls == []


async def test_a_failure_is_raised_in_its_own_class(engine: InMemoryEngine, page: Path) -> None:
    """Word for word, without a call to the engine."""
    watch = PullWatch(WorkerCalls(engine), [status(page)])
    failure = Failure(kind="PeerLostError", message="rank 0: gone", remedy="see")
    tell(page, msgspec.structs.replace(status(page), failure=failure))
    with pytest.raises(PeerLostError, match="rank 0: gone"):
        await watch.look()
    assert engine.calls == []


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as made:
        yield made
        made.kill()


def kill(process: subprocess.Popen[bytes], *, wait_for: bool) -> None:
    process.kill()
    if wait_for:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("waited_for", [True, False])
async def test_a_rank_whose_process_ended_is_found(
    engine: InMemoryEngine,
    page: Path,
    process: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    waited_for: bool,
) -> None:
    """Its page will say nothing more, so the engine is asked, which knows what became of it.

    Until its parent waits for it, a dead process is still listed.
    """
    monkeypatch.setattr(pull_watch, "ALIVE_S", 0.0)
    began = status(page, pid=process.pid)
    watch = PullWatch(WorkerCalls(engine), [began])
    assert await watch.look() == [began]
    assert engine.calls == []
    kill(process, wait_for=waited_for)
    engine.dead = True
    with pytest.raises(EngineCallError, match="did not answer: poll"):
        await watch.look()


async def test_a_rank_that_has_no_page_is_asked(engine: InMemoryEngine, page: Path) -> None:
    """As one of Ray's workers; then all of them are, by one call."""
    without = msgspec.structs.replace(status(page), note=None)
    watch = PullWatch(WorkerCalls(engine), [status(page), without])
    engine.dead = True
    with pytest.raises(EngineCallError, match="did not answer: poll"):
        await watch.look()
