"""Python programs that begin with an engine imported: forks of a process that has done it once.

An engine is imported for ten seconds and more, in each of the up to six processes of a server. A
*nursery*, a process of one thread that has imported the engine and done nothing else, forks
whenever Python would start a program: for the first process of a server, and for every process
that multiprocessing spawns in it. Such a process has the arguments, environment, files, parent and
process group that it would have had; only its imports are there already.

Each process has a nursery of its own, forked before it runs anything. What that one forks is handed
to the process: the one between ends, and the kernel gives orphans to the next process above that
asks for them just then.

What only the start of a program reads, as LD_PRELOAD, needs a real start, and gets one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import util
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["Nursery", "PreloadedProcess", "of_the_allocator", "preloaded"]

_PROJECT = Path(__file__).parents[2]
_REQUEST_BYTES = 1 << 17
_MAX_FILES = 64
_HIGH_FD = 1000
_PR_SET_CHILD_SUBREAPER = 36
_READ_AT_START = "LD_PRELOAD"
_SPAWNED = "--multiprocessing-fork"


class Nursery:
    """Where processes are asked for.

    Args:
        link: to the process that forks them.
        program: that process, if it is nobody else's to keep.
    """

    def __init__(self, link: socket.socket, program: subprocess.Popen[bytes] | None = None) -> None:
        self._link, self._program = link, program
        self._lock = threading.Lock()

    def start(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        files: Mapping[int, int],
        *,
        leader: bool = False,
    ) -> int:
        """Do what `python` would with these arguments; the new process's pid.

        Args:
            arguments: `-m module ...` or `-c code ...`.
            environment: all of it.
            files: what it has open: its number there, and the one here.
            leader: whether it gets a process group of its own.
        """
        request = {
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": os.getcwd(),
            "files": list(files),
            "leader": leader,
        }
        with self._lock, _adopting_orphans():
            socket.send_fds(self._link, [json.dumps(request).encode()], list(files.values()))
            answer = self._link.recv(32)
        if not answer:
            raise RuntimeError("the process that imports the engine has ended, see its output")
        return int(answer)


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class PreloadedProcess:
    """A process in a process group of its own; as `subprocess` has it.

    Args:
        nursery: where it begins.
        arguments: as of `python`.
        environment: all of it.
        files: its stdin, stdout and stderr, open here.
    """

    def __init__(
        self,
        nursery: Nursery,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        files: tuple[int, int, int],
    ) -> None:
        self.pid = nursery.start(arguments, environment, dict(enumerate(files)), leader=True)
        self.returncode: int | None = None
        self._ended = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        """The exit code, once there is one."""
        if self.returncode is None and select.select([self._ended], [], [], 0)[0]:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, as soon as there is one."""
        select.select([self._ended], [], [], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("a preloaded process", timeout or 0.0)
        return code

    def kill(self) -> None:
        """End it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@functools.cache
def preloaded(*modules: str, **environment: str) -> Nursery:
    """The nursery that has imported modules in an environment; it ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        program = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno()), *modules],
            cwd=_PROJECT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    return Nursery(ours, program)


def of_the_allocator(environment: Mapping[str, str] | None) -> dict[str, str]:
    """The settings that glibc reads when a program starts: a nursery's forks keep those it had."""
    named = (environment or {}).items()
    return {name: value for name, value in named if name.startswith("MALLOC_")}


def main() -> None:
    link, before = socket.socket(fileno=int(sys.argv[1])), dict(os.environ)
    for module in sys.argv[2:]:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads"
    set_by_imports = {k: v for k, v in os.environ.items() if before.get(k) != v}
    while True:
        request, files = _asked_for(link)
        if request["leader"]:
            os.setpgid(0, 0)
        ours, link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() != 0:
            break
        ours.close()
        _close(files)
    link.close()
    _spawn_from(Nursery(socket.socket(fileno=_moved_up(ours.detach()))))
    _place_files(files, request["files"])
    os.environ.clear()
    os.environ.update(request["environment"] | set_by_imports)
    os.chdir(request["folder"])
    _read_again()
    _run(*request["arguments"])


def _asked_for(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for each request, and return with it in the fork; end when nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    while True:
        message, files, _, _ = socket.recv_fds(link, _REQUEST_BYTES, _MAX_FILES)
        if not message:
            os._exit(0)
        mine, theirs = os.pipe()
        between = os.fork()
        if between == 0:
            parent, child = os.getpid(), os.fork()
            if child == 0:
                while os.getppid() == parent:
                    time.sleep(0.001)
                break
            os.write(theirs, str(child).encode())
            os._exit(0)
        os.waitpid(between, 0)
        link.send(os.read(mine, 32))
        _close([mine, theirs, *files])
    _close([mine, theirs])
    link.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return json.loads(message), files


def _spawn_from(nursery: Nursery) -> None:
    """Have multiprocessing spawn from a nursery."""
    start_program, at_start = util.spawnv_passfds, os.environ.get(_READ_AT_START)

    def spawn(path: bytes, arguments: Sequence[str], files: Sequence[int]) -> int:
        if arguments[-1] != _SPAWNED or os.environ.get(_READ_AT_START) != at_start:
            return start_program(path, arguments, files)
        code = arguments[arguments.index("-c") :]
        return nursery.start(code, os.environ, {file: file for file in (0, 1, 2, *files)})

    vars(util)["spawnv_passfds"] = spawn


def _place_files(files: Sequence[int], numbers: Sequence[int]) -> None:
    """Give open files the numbers that they must have."""
    for file, number in zip([_moved_up(file) for file in files], numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def _moved_up(file: int) -> int:
    """The same file under a number that nothing else wants."""
    higher = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
    os.close(file)
    return higher


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


def _read_again() -> None:
    """What imports have read from the environment that is another one now."""
    tempfile.tempdir = None
    if (values := sys.modules.get("prometheus_client.values")) is not None:
        vars(values)["ValueClass"] = vars(values)["get_value_class"]()


def _run(flag: str, what: str, *arguments: str) -> None:
    """As `python -m module` or `python -c code`."""
    if flag == "-m":
        sys.argv = [what, *arguments]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [flag, *arguments]
        module = sys.modules["__main__"] = ModuleType("__main__")
        exec(what, vars(module))


if __name__ == "__main__":
    main()
