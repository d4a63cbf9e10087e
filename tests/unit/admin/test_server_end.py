"""A server whose engine is dead ends, whatever its processes wait for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import until

_DEAF = """
import os, signal, subprocess, sys, time
from engine_plugins.admin.runtime_dir import ensure_runtime_dir, join_runtime_dir
from engine_plugins.admin.server_end import ServerEnd, end_with_first_process
signal.signal(signal.SIGTERM, signal.SIG_IGN)

def run(role):
    if role == "first":
        ensure_runtime_dir()
    path = join_runtime_dir()
    children = [role for role in sys.argv[2].split(",") if role] if role == "first" else []
    for child in children:
        subprocess.Popen([sys.executable, "-c", sys.argv[3], child, "", ""])
    if role == "core":
        end_with_first_process(path)
    os.write(1, f"{path} {os.getpid()}\\n".encode())  # in one piece: others write there, too
    if role == "api" or (role == "first" and "other" in children and "api" not in children):
        while not os.path.exists(os.path.join(os.environ["TMPDIR"], "all-are-there")):
            time.sleep(0.05)
        end = ServerEnd(path)
        end.soon("a test says so")
        end.soon("and says it again")
    time.sleep(600)

run(sys.argv[1])
"""
"""Processes that heed no SIGTERM: one builds a server, and may start others of it."""


@contextmanager
def deaf_server(folder: Path, children: str) -> Iterator[tuple[subprocess.Popen[str], set[int]]]:
    """A server and the pids of all its processes; what a failed test leaves of it is killed."""
    command = [sys.executable, "-c", _DEAF, "first", children, _DEAF]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as server:
        try:
            assert server.stdout is not None
            processes = 2 + children.count(",")
            pids = {int(server.stdout.readline().split()[1]) for _ in range(processes)}
            assert len(pids) == processes
            yield server, pids
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("children", "code"), [("other", 1), ("other,api", -9), ("other,api,api", -9)]
)
def test_nothing_is_left_of_a_server_that_does_not_end(
    tmp_path: Path, children: str, code: int
) -> None:
    """No process and no folder, by one API process that is the first, or by one beside others."""
    with deaf_server(tmp_path, children) as (server, pids):
        (tmp_path / "all-are-there").touch()
        assert server.wait(40) == code
        until(
            lambda: not any(psutil.pid_exists(pid) for pid in pids),
            within_s=20,
            otherwise=lambda: [pid for pid in pids if psutil.pid_exists(pid)],
        )
        assert list(tmp_path.glob("engine-plugins-*")) == []


def test_what_a_killed_process_has_started_ends_too(tmp_path: Path) -> None:
    """An engine's core holds the machine's memory, whether anybody can ask it or not."""
    with deaf_server(tmp_path, "core") as (server, pids):
        server.kill()  # and nobody waits for it yet: a zombie has ended, too
        (core,) = pids - {server.pid}
        until(
            lambda: (
                not psutil.pid_exists(core) or psutil.Process(core).status() == psutil.STATUS_ZOMBIE
            ),
            within_s=20,
            otherwise=lambda: "the core is still there",
        )
        assert list(tmp_path.glob("engine-plugins-*")) == []
