"""The page and the files that a server's processes share: real processes, killed for real."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from engine_plugins.admin.shared_state import PAGE_BYTES, SharedState, create_runtime_dir
from engine_plugins.admin.state import EngineState, Pause, UpdateProgress, moved
from engine_plugins.errors import ConflictError, EnginePluginError
from engine_plugins.shared_page import SharedPage
from tests.support.state_processes import enter, program, started

pytestmark = pytest.mark.anyio


def test_a_fresh_page_says_serving(runtime_dir: Path) -> None:
    """With the time from which on it is true; laid out for this user alone, and only once."""
    shared = SharedState(runtime_dir)
    first = shared.read()
    assert first.state == "serving"
    assert time.time() - 60 < first.since <= time.time()
    shared.change(lambda state: moved(state, "paused"))
    create_runtime_dir(runtime_dir)
    assert shared.read().state == "paused", "an existing state is not laid out anew"
    folders = [runtime_dir, *(each for each in runtime_dir.iterdir() if each.is_dir())]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def test_what_one_process_writes_another_reads(runtime_dir: Path) -> None:
    """Both ways, through the page alone."""
    body = """
        shared.change(lambda state: moved(state, "paused", pause=Pause(mode="wait", until=5.0)))
        print("ready", flush=True)
        sys.stdin.readline()
        print(shared.read().state, flush=True)
    """
    shared = SharedState(runtime_dir)
    assert shared.read().state == "serving"
    with started(body, runtime_dir) as process:
        assert shared.read().pause == Pause(mode="wait", until=5.0)
        shared.change(lambda state: moved(state, "asleep"))
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == "asleep"


def test_the_sequence_of_the_page_never_goes_back(runtime_dir: Path) -> None:
    """Not even between two bytes of a store: a reader would take the page for an unwritten one."""
    body = """
        print("ready", flush=True)
        for _ in range(20_000):
            shared.change(lambda state: state)
    """
    page = SharedPage(runtime_dir / "state.page")
    with started(body, runtime_dir) as process:
        last = 0
        while process.poll() is None:
            for _ in range(10_000):
                now = page.sequence
                assert now >= last
                last = now
    assert last == 20_001


def test_no_change_of_concurrent_writers_is_lost_and_no_read_is_torn(runtime_dir: Path) -> None:
    """Three processes and two threads count together; readers see only whole states."""
    rounds = 300
    body = f"""
        def count(state):
            done = int(state.kv_generation or 0) + 1
            pad = "x" * (done * 37 % 3000)
            fence = None
            return msgspec.structs.replace(
                state, kv_generation=str(done), since=float(done), pause=None,
                update=UpdateProgress(
                    request_id=pad, version=done, phase=str(len(pad)), bytes_done=0, bytes_total=0
                ),
            )
        from engine_plugins.admin.state import UpdateProgress
        for _ in range({rounds}):
            shared.change(count)
    """
    shared = SharedState(runtime_dir)
    processes = [program(body, runtime_dir) for _ in range(3)]
    stop = threading.Event()
    torn: list[object] = []

    def watch() -> None:
        mine = SharedState(runtime_dir)
        last = 0
        while not stop.is_set():
            try:
                state = mine.read()
            except Exception as error:  # of any kind: that is what is looked for
                torn.append(error)
                return
            done = int(state.kv_generation or 0)
            update = state.update
            whole = done == 0 or (
                update is not None
                and update.version == done == state.since
                and len(update.request_id) == int(update.phase)
            )
            if not whole or done < last:
                torn.append(state)
            last = done

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    stop.set()
    for watcher in watchers:
        watcher.join()
    assert torn == []
    assert shared.read().kv_generation == str(3 * rounds)


def test_a_writer_that_dies_anywhere_spoils_nothing(runtime_dir: Path) -> None:
    """Killed before each line of `change` in turn: the state is the old or the new one, whole.

    And the next writer writes: the kernel freed the dead one's lock.
    """
    body = """
        lines = int(sys.argv[2])
        def trace(frame, event, argument):
            global lines
            if frame.f_code.co_name not in ("change", "write", "_slot"):
                return trace if event == "call" else None
            if event == "line":
                lines -= 1
                if lines == 0:
                    os.kill(os.getpid(), 9)
            return trace
        sys.settrace(trace)
        shared.change(lambda state: msgspec.structs.replace(state, kv_generation="new" * 500))
        sys.settrace(None)
    """
    shared = SharedState(runtime_dir)
    for lines in range(1, 40):
        shared.change(lambda state: msgspec.structs.replace(state, kv_generation="old" * 700))
        process = program(body, runtime_dir, lines)
        process.communicate(timeout=60)
        for reader in (shared, SharedState(runtime_dir)):
            assert reader.read().kv_generation in ("old" * 700, "new" * 500)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert lines > 8, "the writer was killed at every line"
    assert shared.read().kv_generation == "new" * 500


async def test_one_operation_at_a_time_among_processes_and_within_one(runtime_dir: Path) -> None:
    """Refused at once, with what is under way; free again when the holder ends or dies."""
    body = """
        async def hold():
            async with shared.operation("update"):
                print("ready", flush=True)
                sys.stdin.readline()
        asyncio.run(hold())
        print("free", flush=True)
        sys.stdin.readline()
    """
    shared = SharedState(runtime_dir)
    with started(body, runtime_dir) as process:
        began = time.monotonic()
        said = rf"cannot pause: update \(process {process.pid}, for 0\.\d s\) is under way \["
        with pytest.raises(ConflictError, match=said):
            await enter(shared, "pause")
        shared.change(lambda state: moved(state, "updating", update=progress(version=7)))
        with pytest.raises(ConflictError, match="cannot resume: the update to version 7"):
            await enter(shared, "resume")
        assert time.monotonic() - began < 5
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == "free"
        assert shared.under_way() is None
        await enter(shared, "resume")
    with started(body, runtime_dir) as process:
        process.kill()
        process.wait()
        await enter(shared, "update")
    async with shared.operation("pause"):
        for each in (shared, SharedState(runtime_dir)):
            with pytest.raises(ConflictError):
                await enter(each, "flush")
    with pytest.raises(ZeroDivisionError):
        async with shared.operation("pause"):
            raise ZeroDivisionError
    await enter(shared, "flush")


def progress(*, version: int) -> UpdateProgress:
    return UpdateProgress(
        request_id="r", version=version, phase="pull", bytes_done=0, bytes_total=1
    )


async def test_an_operation_waits_for_another_and_says_how_long(runtime_dir: Path) -> None:
    """As long as it was told to, and no longer than it is of use."""
    shared, other = SharedState(runtime_dir), SharedState(runtime_dir)

    async def hold(seconds: float) -> None:
        async with shared.operation("pause"):
            await asyncio.sleep(seconds)

    for each in (shared, other):
        holding = asyncio.create_task(hold(0.3))
        await asyncio.sleep(0.1)
        assert 0.15 < await enter(each, "update", wait_s=5) < 1
        await holding
    holding = asyncio.create_task(hold(0.6))
    await asyncio.sleep(0.1)
    with pytest.raises(ConflictError, match=r"pause \(.* also after a wait of 0.2 s"):
        await enter(other, "update", wait_s=0.2)
    shared.change(lambda state: moved(state, "asleep"))

    def unless(state: EngineState) -> None:
        assert state.state != "asleep", "of no use"

    with pytest.raises(AssertionError, match="of no use"):
        await enter(other, "update", wait_s=5, unless=unless)
    await holding
    assert await enter(shared, "update", unless=unless) < 0.1, "nobody was waited for"


async def test_a_program_that_the_holder_starts_does_not_hold_the_lock(runtime_dir: Path) -> None:
    """Descriptors are not inherited: a child that lives on would keep the server locked."""
    shared = SharedState(runtime_dir)
    async with shared.operation("update"):
        child = sleeper()
    try:
        await enter(shared, "pause")
    finally:
        child.kill()
        child.communicate()


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


async def test_a_forked_child_neither_holds_the_lock_nor_lets_it_go(runtime_dir: Path) -> None:
    """Engines fork their core: it outlives an API process that is killed in an operation."""
    body = """
        import signal
        async def hold():
            async with shared.operation("update"):
                child = os.fork()
                if child == 0:
                    try:
                        async with shared.operation("pause"):
                            print("both", flush=True)
                    except Exception as error:
                        print(type(error).__name__, flush=True)
                    shared.change(lambda state: moved(state, "paused"))
                    signal.pause()
                time.sleep(0.2)
                print("ready", flush=True)
                print(child, flush=True)
                sys.stdin.readline()
        asyncio.run(hold())
    """
    shared = SharedState(runtime_dir)
    process = program(body, runtime_dir)
    assert process.stdout is not None
    lines = [process.stdout.readline().strip() for _ in range(3)]
    try:
        assert lines[:2] == ["ConflictError", "ready"]
        assert shared.read().state == "paused"
        with pytest.raises(ConflictError):
            await enter(shared, "flush")
        process.kill()
        process.wait()
        await enter(shared, "flush")
    finally:
        process.kill()
        os.kill(int(lines[2]), signal.SIGKILL)
        process.communicate()


def test_a_state_that_does_not_fit_is_refused_and_the_old_one_stays(runtime_dir: Path) -> None:
    """A message of any length must not write past its place."""
    shared = SharedState(runtime_dir)
    before = shared.read()
    too_long = "x" * PAGE_BYTES
    with pytest.raises(EnginePluginError, match="do not fit"):
        shared.change(lambda state: msgspec.structs.replace(state, kv_generation=too_long))
    assert shared.read() == SharedState(runtime_dir).read() == before


def test_reading_is_quick(runtime_dir: Path) -> None:
    """It is asked on every request of the engine."""
    shared = SharedState(runtime_dir)
    shared.read()
    began = time.thread_time()
    for _ in range(10_000):
        shared.read()
    assert time.thread_time() - began < 1
    assert isinstance(shared.read(), EngineState)
    assert os.path.getsize(runtime_dir / "state.page") == PAGE_BYTES
