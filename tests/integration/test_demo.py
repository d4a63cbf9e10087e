"""`make demo` as a user has it: what it shows, and what it leaves behind.

It is run with the engine of this environment.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
MARK = "ENGINE_PLUGINS_TEST_DEMO"
ENGINE = "vllm" if importlib.util.find_spec("vllm") else "sglang"
TITLE = {"vllm": "vLLM", "sglang": "SGLang"}[ENGINE]


class Demo:
    """A running demo whose processes can be told: by a mark in their environment, or a group.

    Engines write titles over the environment of their processes; the group's leader keeps it.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.groups: set[int] = set()
        self.process = subprocess.Popen(
            [sys.executable, "examples/live_update_demo.py", "--engine", ENGINE, *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                MARK: self.mark,
                "TMPDIR": str(folder),
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
        said, _ = self.process.communicate(timeout=300)
        return self.process.returncode, said

    def processes(self) -> list[psutil.Process]:
        """Every process that still runs and was started by this demo, or is it.

        A group is known from the first call that finds a marked process in it.
        """
        groups: dict[psutil.Process, int] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                groups[process] = os.getpgid(process.pid)
                if process.environ().get(MARK) == self.mark:
                    self.groups.add(groups[process])
        return [process for process, group in groups.items() if group in self.groups]

    def wait_for(self, count: int) -> None:
        """Wait until at least `count` of its processes run."""
        deadline = time.monotonic() + 60
        while len(self.processes()) < count:
            assert time.monotonic() < deadline, f"only {self.processes()} run"
            assert self.process.poll() is None, "the demo ended"
            time.sleep(0.1)

    def leftovers(self) -> list[str]:
        """Temporary files and folders that are still there."""
        return [path.name for path in self.folder.iterdir()]


StartDemo = Callable[..., Demo]


@pytest.fixture
def start_demo() -> Iterator[StartDemo]:
    """Start demos whose temporary files all go to one folder; end what they leave running."""
    demos: list[Demo] = []
    # Not pytest's own: vLLM puts sockets there, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="t") as folder:

        def start(*arguments: str) -> Demo:
            demos.append(Demo(Path(folder), *arguments))
            return demos[-1]

        yield start
        for demo in demos:
            for process in demo.processes():
                process.kill()
            demo.finished()


def test_it_updates_a_live_server_and_proves_it(start_demo: StartDemo) -> None:
    """Exit code 0, a row per step, both verdicts good, nothing left; plain text in a pipe."""
    demo = start_demo("--steps", "3")
    said = demo.output_until("training, and updating")
    assert len(demo.processes()) >= 4  # the demo, and of the server three at least
    code, rest = demo.finished()
    said += rest
    assert code == 0, said
    rows = [line.split() for line in said.splitlines()]
    steps = [row for row in rows if len(row) > 4 and row[0].isdigit() and row[1].isdigit()]
    assert [row[:2] for row in steps] == [["1", "1"], ["2", "2"], ["3", "3"]], said
    assert f"\n{TITLE} (process " in said
    assert ("stubbed kernel import" in said) == (ENGINE == "sglang")
    assert "fresh weights" in said
    assert "a long request was in flight while versions 1" in said
    assert "greedy tokens equal" in said
    assert "\x1b" not in said
    assert max(map(len, said.splitlines())) <= 80
    assert demo.processes() == []
    assert demo.leftovers() == []


SIGNALLED = {
    "vllm": (signal.SIGINT, 4),  # the demo, the API server, its resource tracker, an engine's
    "sglang": (signal.SIGTERM, 2),  # the demo and the API server, which is still importing
}
"""A signal, and how many processes run when it comes; the demo takes either alike."""


def test_a_signal_in_the_middle_leaves_nothing_behind(start_demo: StartDemo) -> None:
    """While the server starts: all its processes end with the demo, and its folder goes."""
    number, processes = SIGNALLED[ENGINE]
    demo = start_demo()
    demo.output_until(f"starting {TITLE}")
    demo.wait_for(processes)
    os.killpg(demo.process.pid, number)
    code, said = demo.finished()
    assert code == 130, said
    assert "stopped" in said
    assert demo.processes() == []
    assert demo.leftovers() == []
