"""What a server holds at a moment: memory, descriptors and threads by process, and files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos_update.fleet import Target
from tests.chaos_update.processes import Processes
from tests.liveness.leftovers import group_of, shared_by

__all__ = ["Held", "Sampler"]


@dataclass(frozen=True, kw_only=True)
class Held:
    """A moment.

    Attributes:
        memory: bytes that are no file's, by process.
        descriptors: open files and sockets, by process.
        threads: by process.
        files: by where they are: the runtime directory, the folder for temporary files, shared
            memory.
    """

    memory: dict[str, int] = field(default_factory=dict)
    descriptors: dict[str, int] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)


class Sampler:
    """Looks at a server, and at the trainer that updates it.

    Args:
        target: the server.
        trainer: the trainer's pid, if there is one.
    """

    def __init__(self, target: Target, trainer: int | None = None) -> None:
        self._runtime_dir = target.runtime_dir
        self._processes: dict[str, psutil.Process] = {}
        roles = _roles(target)
        for each in sorted(group_of(target.server.pid), key=psutil.Process.create_time):
            role = roles.get(each.pid, "beside")
            name = role
            while name in self._processes:
                name = f"{role} {int(name.rpartition(' ')[2]) + 1 if name != role else 2}"
            self._processes[name] = each
        if trainer is not None:
            self._processes["trainer"] = psutil.Process(trainer)

    def look(self) -> Held:
        """How it is now."""
        held = Held()
        shared: set[str] = set()
        for name, process in self._processes.items():
            held.memory[name] = _memory(process.pid)
            held.descriptors[name] = process.num_fds()
            held.threads[name] = process.num_threads()
            shared |= shared_by(process.pid)
        temporary = self._runtime_dir.parent
        held.files["runtime directory"] = _count(self._runtime_dir)
        held.files["temporary folder"] = _count(temporary) - held.files["runtime directory"]
        held.files["shared memory"] = len(shared)
        return held


def _roles(target: Target) -> dict[int, str]:
    found = Processes(target.server, target.kind.api_servers)
    roles = dict.fromkeys(found.apis, "API")
    roles[found.core] = "core" if target.kind.engine == "vllm" else "scheduler"
    for pid in found.workers:
        roles.setdefault(pid, "worker")
    roles.setdefault(target.server.pid, "first")
    return roles


def _memory(pid: int) -> int:
    """Anonymous and shared memory that is resident; pages of files come and go."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return sum(int(status[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*"))
