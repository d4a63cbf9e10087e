"""What makes each stuck state, and what takes its cause away again."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos_update.fleet import Target
from tests.chaos_update.processes import Processes
from tests.chaos_update.trainer import Trainer
from tests.liveness.calls import Call
from tests.liveness.rows import Row

__all__ = ["Mend", "Stage", "culprits", "struck"]

Mend = Callable[[], None]
LOW_DESCRIPTORS = 8
"""All below it are taken from the start, so nothing more can be opened; what is open stays."""
SMALL_FILE_BYTES = 1 << 20
"""Less than the weights of a rank."""


@dataclass(kw_only=True)
class Stage:
    """Who takes part in a row.

    Attributes:
        row: which.
        target: the server.
        processes: its pids.
        trainer: in the middle of an update, if it is about one.
        call: what was asked instead.
        still: API processes that go on once the state is made.
    """

    row: Row
    target: Target
    processes: Processes
    trainer: Trainer
    call: Call | None = None
    still: set[int] = field(default_factory=set)

    @property
    def caller(self) -> Trainer | Call:
        """Who waits for an answer."""
        return self.call or self.trainer


def struck(stage: Stage) -> Mend:
    """Make the state; returns what takes the cause away."""
    fault = stage.row.fault
    if fault == "trainer_killed":
        stage.trainer.signal(signal.SIGKILL)
        return _nothing
    if fault == "disk_full":
        return _filled(stage.target.runtime_dir.parent)
    if fault == "no_descriptors":
        return _limited(stage.processes.apis, resource.RLIMIT_NOFILE, LOW_DESCRIPTORS)
    if fault == "no_room_to_sleep":  # weights wait in a file
        return _limited(stage.processes.workers, resource.RLIMIT_FSIZE, SMALL_FILE_BYTES)
    if fault == "folder_deleted":
        shutil.rmtree(stage.target.runtime_dir)
        return _nothing
    if fault == "long_error":  # was told before the update began
        return _nothing
    role, _, what = fault.partition("_")
    if fault == "terminated":  # as a supervisor does it
        os.kill(stage.target.server.pid, signal.SIGTERM)
        return _nothing
    if fault == "group_terminated":  # as a terminal's Ctrl-C and a batch system do it
        os.killpg(stage.target.server.pid, signal.SIGTERM)
        return _nothing
    if what == "killed":
        os.kill(_pid(stage, role), signal.SIGKILL)
        return _nothing
    return _stopped(stage, _pid(stage, role))


def culprits(stage: Stage) -> tuple[str, ...]:
    """Words of which one has to be in what the trainer is told, or in /state."""
    fault = stage.row.fault
    last = len(stage.processes.workers) - 1
    if fault.startswith("worker_") or (fault.startswith("core_") and stage.row.engine == "sglang"):
        rank = last if fault.startswith("worker_") else 0
        return f"rank {rank}", str(stage.processes.workers[rank]), "scheduler"[: 99 * (last == 0)]
    if fault.startswith("core_"):
        return "core", str(stage.processes.core)
    return {
        "disk_full": ("space", "disk"),
        "no_descriptors": ("open files", "descriptor"),
        "no_room_to_sleep": ("too large", "room"),
        "folder_deleted": ("untime director", "No such file"),
        "long_error": ("told to fail",),
    }.get(fault, ())


def _carrying(stage: Stage) -> int:
    """The API process that has the caller's connection; it carries what was asked."""
    apis = stage.processes.apis
    if len(apis) == 1:
        return apis[0]
    if isinstance(stage.caller, Trainer):
        theirs = {own for own, _ in _ports(stage.caller.process.pid)}
    else:
        theirs = {stage.caller.port}
    for pid in apis:
        if any(other in theirs for _, other in _ports(pid)):
            return pid
    raise RuntimeError("no API process has a connection of the caller's")


def _ports(pid: int) -> list[tuple[int, int]]:
    """Of each connection of a process: its own port, and the other end's."""
    found = psutil.Process(pid).net_connections("tcp")
    return [
        (each.laddr.port, each.raddr.port)
        for each in found
        if each.status == psutil.CONN_ESTABLISHED
    ]


def _pid(stage: Stage, role: str) -> int:
    if role == "worker":
        return stage.processes.workers[-1]
    return stage.processes.core if role == "core" else _carrying(stage)


def _stopped(stage: Stage, pid: int) -> Mend:
    os.kill(pid, signal.SIGSTOP)
    stage.still.discard(pid)

    def mend() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    return mend


def _filled(folder: Path) -> Mend:
    """Fill the disk that a folder is on; it is one of the tests' own, see `__main__`."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    return ballast.unlink


def _limited(pids: list[int], what: int, limit: int) -> Mend:
    """Lower a limit of processes."""
    before = {pid: resource.prlimit(pid, what) for pid in pids}
    for pid, (_, hard) in before.items():
        resource.prlimit(pid, what, (limit, hard))

    def mend() -> None:
        for pid, limits in before.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, what, limits)

    return mend


def _nothing() -> None:
    """There is nothing to take away."""
