"""Child processes that never outlive the demo, and the folder that they share.

A server is a tree of processes; each child here leads a process group, which is ended as a whole.
(Not a session: on two cores, with the kernel's scheduling by session, vLLM's spinning processes
kept its API server from running for seconds.)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

import psutil

__all__ = ["Child", "ChildFailedError", "Children"]

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Child:
    """A running process group; its stderr, and what nobody reads of its stdout, is in `log`."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def output(self) -> IO[str]:
        """Its stdout, of a child started with `piped`."""
        if self.process.stdout is None:
            raise ValueError(f"{self.name} writes to {self.log}")
        return self.process.stdout

    def check_runs(self) -> None:
        """Raise ChildFailedError if it has ended."""
        if self.process.poll() is not None:
            raise ChildFailedError(self, f"ended with exit code {self.process.returncode}")

    def wait(self) -> None:
        """Wait until it has ended; raise ChildFailedError unless that was a success."""
        if self.process.wait() != 0:
            self.check_runs()

    def group_runs(self) -> bool:
        """Whether any process of the group still runs; ended ones that nobody reaped do not."""
        self.process.poll()
        for process in psutil.process_iter(["status"]):
            with contextlib.suppress(ProcessLookupError):
                of_group = os.getpgid(process.pid) == self.process.pid
                if of_group and process.info["status"] != psutil.STATUS_ZOMBIE:
                    return True
        return False


class ChildFailedError(Exception):
    """A child did not do what it is for; the text has the end of its log."""

    def __init__(self, child: Child, what: str) -> None:
        tail = "\n".join(child.log.read_text(errors="replace").splitlines()[-25:])
        super().__init__(f"{child.name} {what}; the end of its log {child.log}:\n{tail}")


class Children:
    """A context in which children run; leaving it, however that happens, ends them all.

    While it lasts SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt. Children have the environment
    of this process, with `environment` over it.

    Attributes:
        folder: a temporary folder, the children's too; removed at the end unless `keep` is set.
    """

    def __init__(self, environment: Mapping[str, str], *, keep: bool = False) -> None:
        self._environment = environment
        self.keep = keep
        self._children: list[Child] = []
        self._interrupted_at = float("-inf")

    def __enter__(self) -> Self:
        for number in ENDING:
            signal.signal(number, self._interrupt)
        with _signals_held():
            self.folder = Path(tempfile.mkdtemp(prefix="demo-"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
        self._end_all()
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        piped: bool = False,
    ) -> Child:
        """Start a command as leader of a new group; with `piped` its stdout can be read.

        Args:
            name: of its log.
            command: a program and its arguments.
            environment: over that of all children.
            piped: whether somebody reads its stdout.
        """
        temporary = {"TMPDIR": str(self.folder)}
        log = self.folder / f"{name}.log"
        with _signals_held(), log.open("w") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, **self._environment, **temporary, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else output,
                stderr=output,
                text=True,
                process_group=0,
            )
            child = Child(name=name, process=process, log=log)
            self._children.append(child)
        return child

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # `make` passes on the signal that this process already has: one of the two counts.
        now = time.monotonic()
        if now - self._interrupted_at > 2.0:
            self._interrupted_at = now
            raise KeyboardInterrupt

    def _end_all(self) -> None:
        """Ask every leader to end its group in good order; end by force what is left then.

        vLLM ignores SIGTERM while it starts. The last resort comes late: it also hits the helper
        process of Python's multiprocessing that removes shared memory after the others.
        """
        for leader, group, patience_s in (
            (signal.SIGTERM, None, 4.0),
            (signal.SIGKILL, signal.SIGTERM, 1.0),
            (signal.SIGKILL, signal.SIGKILL, 3.0),
        ):
            for child in self._running():
                child.process.send_signal(leader)
                if group is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.process.pid, group)
            deadline = time.monotonic() + patience_s
            while self._running() and time.monotonic() < deadline:
                time.sleep(0.1)

    def _running(self) -> list[Child]:
        return [child for child in self._children if child.group_runs()]


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Put off signals: what the block makes is on record before they are heard."""
    heard: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    former: dict[int, Any] = {number: signal.signal(number, note) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if heard:
            raise KeyboardInterrupt
