"""Taking the place of a process that does not answer: real processes, stopped and woken."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import EngineState, Fence, UpdateProgress, moved
from engine_plugins.errors import ConflictError, OutdatedError, WriterStoppedError
from tests.support.state_processes import enter, program, started

pytestmark = pytest.mark.anyio

FENCE = Fence(code="peer_lost", detail="half", remedy="repeat", attempted_version=7)
UPDATE = UpdateProgress(request_id="r", version=7, phase="install", bytes_done=1, bytes_total=2)


def fenced(state: EngineState) -> EngineState:
    return moved(state, "fenced", fence=FENCE, update=None)


def stops(process: subprocess.Popen[str]) -> bool:
    """Whether it stops itself; otherwise it has ended."""
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    return os.WIFSTOPPED(status)


def stop(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


@contextmanager
def stopped(process: subprocess.Popen[str]) -> Iterator[None]:
    """A process that has stopped itself; it goes on afterwards, to its end."""
    assert stops(process), "it has ended"
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


CARRIER = """
    from engine_plugins.errors import OutdatedError
    async def carry():
        async with shared.operation("update"):
            shared.change(lambda state: moved(state, "updating"))
            print("ready", flush=True)
            sys.stdin.readline()
            refused = []
            for attempt in (
                shared.require_newest,
                lambda: shared.change(lambda state: moved(state, "serving", fence=None)),
            ):
                try:
                    attempt()
                except OutdatedError as error:
                    refused.append(error.code)
            print(*refused, shared.generation, shared.read().state, flush=True)
        async with shared.operation("pause"):
            shared.change(lambda state: moved(state, "paused"))
            print(shared.generation, flush=True)
    asyncio.run(carry())
"""


async def test_a_fence_needs_no_lock_of_a_stopped_process(runtime_dir: Path) -> None:
    """At once, for all; the woken process publishes nothing, and its next call works."""
    shared, other = SharedState(runtime_dir), SharedState(runtime_dir)
    with started(CARRIER, runtime_dir) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stop(process)
        call = shared.under_way()
        assert call is not None
        assert (call.name, call.pid) == ("update", process.pid)
        with pytest.raises(ConflictError):
            await enter(shared, "pause")
        began = time.monotonic()
        assert shared.take_over(fenced).fence == FENCE
        assert time.monotonic() - began < 0.5
        assert (shared.generation, other.read().fence) == (1, FENCE)
        assert other.under_way() is None
        async with other.operation("update"):
            assert other.generation == 1
            other.change(lambda state: msgspec.structs.replace(state, update=UPDATE))
        os.kill(process.pid, signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().split() == ["outdated", "outdated", "0", "fenced"]
        assert process.stdout.readline().strip() == "1", "a new call is of the new generation"
        assert process.wait(10) == 0
    assert (shared.read().state, shared.read().update) == ("paused", UPDATE)


async def test_a_process_stopped_at_any_line_of_a_write_holds_up_nobody(runtime_dir: Path) -> None:
    """Stopped before each line of `change` in turn, and woken when another has taken its place."""
    body = """
        import signal
        lines = int(sys.argv[2])
        def trace(frame, event, argument):
            global lines
            if frame.f_code.co_name not in ("change", "_writing", "write", "still_newest"):
                return trace if event == "call" else None
            if event == "line":
                lines -= 1
                if lines == 0:
                    sys.settrace(None)
                    os.kill(os.getpid(), signal.SIGSTOP)
            return trace
        sys.settrace(trace)
        try:
            shared.change(lambda state: msgspec.structs.replace(state, kv_generation="late" * 500))
        except Exception as error:
            print(type(error).__name__, flush=True)
    """
    shared, told = SharedState(runtime_dir), set[str]()
    for line in range(1, 60):
        process = program(body, runtime_dir, line)
        if not stops(process):
            process.communicate()
            break
        mark = f"new{line}"

        def newer(state: EngineState, mark: str = mark) -> EngineState:
            return msgspec.structs.replace(fenced(state), kv_generation=mark)

        began = time.monotonic()
        assert shared.take_over(newer).kv_generation == mark
        await enter(shared, "update")
        assert time.monotonic() - began < 0.5
        os.kill(process.pid, signal.SIGCONT)
        told.add(process.communicate(timeout=20)[0].strip())
        assert shared.read().kv_generation in (mark, "late" * 500)
        if shared.read().kv_generation != mark:
            assert line < 12, "only what had not begun when its place was taken may still count"
        shared.change(lambda state: moved(state, "paused"))
        assert shared.read().state == "paused"
    assert line > 20, "it was stopped at every line"
    assert "OutdatedError" in told


async def test_the_state_is_a_fence_before_the_successor_has_said_why(runtime_dir: Path) -> None:
    """Also where the successor dies before it says anything: the next change goes on from there."""
    shared = SharedState(runtime_dir)
    shared.change(lambda state: moved(state, "updating", update=UPDATE))
    before = shared.read()

    def dies(state: EngineState) -> EngineState:
        assert SharedState(runtime_dir).read() == state
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        shared.take_over(dies)
    state = shared.read()
    assert state.fence is not None
    assert state.fence.code == "carrier_stopped"
    assert "version 7 does not answer" in state.fence.detail
    assert state.fence.attempted_version == 7
    assert (state.state, state.update, state.holding) == ("fenced", None, None)
    assert state.weights.version is None
    assert state.kv_life == before.kv_life
    assert before.since <= state.since <= time.time()
    assert shared.change(fenced).fence == FENCE
    assert SharedState(runtime_dir).read().kv_mark == before.kv_mark


async def test_of_two_that_take_over_one_does(runtime_dir: Path) -> None:
    """Both watchers of a server see the same stopped process."""
    first, second = SharedState(runtime_dir), SharedState(runtime_dir)
    assert first.take_over(fenced, of=0).fence == FENCE
    assert second.take_over(lambda state: moved(state, "asleep"), of=0).fence == FENCE
    assert (first.generation, second.generation) == (1, 1)
    assert second.take_over(lambda state: moved(state, "asleep"), of=1).state == "asleep"
    assert first.take_over(fenced, of=0).state == "asleep"


async def test_an_operation_of_this_process_is_outdated_too(runtime_dir: Path) -> None:
    """A call that hangs in the engine: its own process's watcher takes over, and works on.

    Whatever the call had started counts as part of it.
    """
    shared = SharedState(runtime_dir)
    wake = asyncio.Event()
    refused = list[int]()

    async def late() -> None:
        await wake.wait()
        with pytest.raises(OutdatedError):
            shared.change(lambda state: moved(state, "serving"))
        refused.append(shared.generation)

    async def hang() -> None:
        async with shared.operation("update"):
            task = asyncio.create_task(late())
            await wake.wait()
            with pytest.raises(OutdatedError):
                shared.change(lambda state: moved(state, "serving"))
            await task

    hanging = asyncio.create_task(hang())
    await asyncio.sleep(0)
    shared.take_over(fenced)
    async with shared.operation("update"):
        wake.set()
        await hanging
        shared.change(lambda state: moved(state, "paused"))
    assert refused == [0]
    assert shared.read().state == "paused"
    await enter(shared, "update")


async def test_who_waits_for_the_place_gets_the_new_one(runtime_dir: Path) -> None:
    """The one that it waited for will never be free."""
    shared = SharedState(runtime_dir)
    async with shared.operation("update"):
        waiting = asyncio.create_task(enter(SharedState(runtime_dir), "pause", wait_s=5))
        await asyncio.sleep(0.1)
        SharedState(runtime_dir).take_over(fenced)
        assert await waiting < 1


async def test_a_process_that_stops_while_it_writes_is_told_of(runtime_dir: Path) -> None:
    """In a bounded time; reading goes on meanwhile, and taking over solves it."""
    body = """
        import signal
        def stop(state):
            os.kill(os.getpid(), signal.SIGSTOP)
            return moved(state, "asleep")
        try:
            shared.change(stop)
        except Exception as error:
            print(type(error).__name__, flush=True)
    """
    shared = SharedState(runtime_dir)
    process = program(body, runtime_dir)
    with stopped(process):
        began = time.monotonic()
        with pytest.raises(WriterStoppedError, match="it is stopped"):
            shared.change(fenced)
        assert 0.5 < time.monotonic() - began < 3
        assert shared.read().state == "serving"
        assert shared.take_over(fenced).fence == FENCE
        assert shared.change(lambda state: moved(state, "paused")).state == "paused"
    assert process.communicate(timeout=20)[0].strip() == "OutdatedError"
    assert shared.read().state == "paused"


def test_a_change_needs_no_descriptor_no_path_and_no_disk(runtime_dir: Path) -> None:
    """Everything was opened at the start: all is used up, and the runtime directory is gone."""
    body = """
        import resource, shutil
        async def main():
            shutil.rmtree(shared.runtime_dir)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
            used = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            try:
                while True:
                    used.append(os.dup(0))
            except OSError as error:
                assert error.errno == 24
            for name in ("update", "pause"):
                async with shared.operation(name):
                    shared.change(lambda state: moved(state, "paused", pause=None))
                    assert shared.under_way().name == name
            shared.take_over(lambda state: moved(state, "asleep"))
            async with shared.operation("wake"):
                shared.change(lambda state: msgspec.structs.replace(state, kv_generation="w"))
            print(shared.read().state, shared.read().kv_generation)
        asyncio.run(main())
    """
    process = program(body, runtime_dir)
    assert process.communicate(timeout=20)[0].split() == ["asleep", "w"]
    assert process.returncode == 0
