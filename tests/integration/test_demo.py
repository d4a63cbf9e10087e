"""`make demo` as a user has it: what it shows, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
MARK = "ENGINE_PLUGINS_TEST_DEMO"


class Demo:
    """A running demo whose processes can be told by a mark in their environment."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "examples/live_update_demo.py", *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                MARK: self.mark,
                "TMPDIR": str(folder),
                "VLLM_RPC_BASE_PATH": "/tmp",  # a socket's path must be short
                "COLUMNS": "80",
                "PYTHONUNBUFFERED": "1",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )

    def output_until(self, text: str) -> str:
        """Everything printed up to and with the line that has `text`."""
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if text in line:
                return said
        raise AssertionError(f"the demo ended before it said {text!r}:\n{said}")

    def finished(self) -> tuple[int, str]:
        """The exit code and the rest of what it prints."""
        said, _ = self.process.communicate(timeout=170)
        return self.process.returncode, said

    def processes(self) -> list[psutil.Process]:
        """Every process that still runs and was started by this demo, or is it."""
        running = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    running.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return running

    def wait_for(self, count: int) -> None:
        """Wait until at least `count` of its processes run."""
        deadline = time.monotonic() + 60
        while len(self.processes()) < count:
            assert time.monotonic() < deadline, f"only {self.processes()} run"
            assert self.process.poll() is None, "the demo ended"
            time.sleep(0.1)

    def leftovers(self) -> list[str]:
        """Temporary folders of the demo that are still there."""
        return [path.name for path in self.folder.glob("engine-plugins-demo-*")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the demo makes its temporary folder."""
    return tmp_path


@pytest.fixture(autouse=True)
def _no_orphans() -> Iterator[None]:
    yield
    for process in psutil.process_iter():
        try:
            if MARK in process.environ() and process.pid != os.getpid():
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def test_it_updates_a_live_server_and_proves_it(folder: Path) -> None:
    """Exit code 0, a row per step, both verdicts good, nothing left; plain text in a pipe."""
    demo = Demo(folder, "--steps", "3")
    code, said = demo.finished()
    assert code == 0, said
    rows = [line.split() for line in said.splitlines()]
    steps = [row for row in rows if len(row) > 4 and row[0].isdigit() and row[1].isdigit()]
    assert [row[:2] for row in steps] == [["1", "1"], ["2", "2"], ["3", "3"]], said
    assert "fresh weights" in said
    assert "a long request was in flight while versions 1" in said
    assert "greedy tokens equal" in said
    assert "\x1b" not in said
    assert max(map(len, said.splitlines())) <= 80
    assert demo.processes() == []
    assert demo.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_leaves_nothing_behind(folder: Path, number: signal.Signals) -> None:
    """While vLLM starts its processes: they end with the demo, and its folder goes."""
    demo = Demo(folder)
    demo.output_until("starting vllm serve")
    demo.wait_for(4)  # the demo, the API server, its resource tracker and the engine
    os.killpg(demo.process.pid, number)
    code, said = demo.finished()
    assert code == 130, said
    assert "stopped" in said
    assert demo.processes() == []
    assert demo.leftovers() == []
