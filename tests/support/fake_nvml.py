"""A fake NVML, compiled by the tests, and scenes on it: processes on GPUs as a driver lists them.

It is put in the way of a process that is started for it alone: an engine that finds one may
believe that it has a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from engine_plugins.sleep.gpu_processes import PidProof
from engine_plugins.sleep.memory_report import GpuDevice
from engine_plugins.sleep.process_identity import ProcessIdentity, identify, own_namespace
from engine_plugins.sleep.rank_memory import RankMemory

__all__ = ["GPU_A", "GPU_B", "NOT_AVAILABLE", "OWN_NAMESPACE", "Scene", "build_nvml", "run_scenes"]

_SOURCE = Path(__file__).with_name("fake_nvml.c")
_PROJECT = Path(__file__).parents[2]
_IDENTIFY = (
    "import msgspec, sys; from engine_plugins.sleep.process_identity import identify;"
    "print(msgspec.json.encode(identify()).decode(), flush=True); sys.stdin.read()"
)
OWN_NAMESPACE = ("unshare", "-p", "-f", "--mount-proc")
"""What a command is put behind to run in a pid namespace of its own."""

NOT_AVAILABLE = 2**64 - 1
GPU_A = GpuDevice(uuid="GPU-a", pci_address="0000:1a:00.0")
GPU_B = GpuDevice(uuid="GPU-b", pci_address="0000:2a:00.0")


def build_nvml(folder: Path, *without: str) -> Path:
    """A folder with libnvidia-ml.so.1, without some groups of functions (see the source)."""
    folder.mkdir(parents=True, exist_ok=True)
    library = str(folder / "libnvidia-ml.so.1")
    lacking = [f"-DWITHOUT_{each.upper()}" for each in without]
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, str(_SOURCE), *lacking], check=True)
    return folder


def run_scenes(
    play: Callable[..., Any], names: list[str], *, library: Path | None, namespace: bool
) -> dict[str, Any]:
    """What functions of the module of `play` answer, by name, each given a scene of its own.

    They run in one process that finds the library, in a pid namespace of its own if asked for.
    `play` turns what a function gives into JSON.
    """
    environ = {**os.environ, "LD_LIBRARY_PATH": str(library or "")}
    command = [sys.executable, "-m", "tests.support.fake_nvml", play.__module__, play.__name__]
    if namespace:
        environ["DRIVER_NAMESPACE"] = str(own_namespace())
        environ["OUTSIDE"] = msgspec.json.encode(identify()).decode()
        command = [*OWN_NAMESPACE, *command]
    done = subprocess.run(
        [*command, *names], cwd=_PROJECT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


class Scene:
    """GPU A and GPU B, and what a driver says of them; the process of the scene is a worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._script = folder / "nvml"
        self._lines: list[str] = []
        self._ended = contextlib.ExitStack()
        os.environ["FAKE_NVML"] = str(self._script)
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
        outside = os.environ.get("DRIVER_NAMESPACE")
        self.proof = PidProof(
            driver_namespace=int(outside) if outside else own_namespace(),
            device_files=str(folder / "nvidia"),
        )
        self.gpu(GPU_A, used=40 << 30)
        self.gpu(GPU_B, used=50 << 30)

    @property
    def outside(self) -> ProcessIdentity:
        """A process outside the pid namespace of the scene."""
        return msgspec.json.decode(os.environ["OUTSIDE"], type=ProcessIdentity)

    def gpu(self, device: GpuDevice, *, used: int, mig: bool = False) -> None:
        self._lines = [line for line in self._lines if f"gpu {device.uuid} " not in line]
        self._say(f"gpu {device.uuid} {device.pci_address} {used} {int(mig)}")

    def process(
        self, pid: int, used: int, device: GpuDevice = GPU_A, kind: str = "process"
    ) -> None:
        self._say(f"{kind} {device.uuid} {pid} {used}")

    def fail(self, function: str, code: int) -> None:
        self._say(f"fail {function} {code}")

    def child(self) -> int:
        """A process below this one."""
        return self._until_the_end(subprocess.Popen(["sleep", "60"]).pid)

    def family(self) -> tuple[int, int, Callable[[], object]]:
        """A child, a process below it, and how the child ends and leaves that one behind."""
        shell = subprocess.Popen(
            ["sh", "-c", "sleep 60 & echo $!; wait; read line"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._until_the_end(shell.pid)
        assert shell.stdout is not None
        below = self._until_the_end(int(shell.stdout.readline()))

        def end() -> None:
            shell.kill()
            shell.wait()

        return shell.pid, below, end

    def end(self, pid: int) -> None:
        """Kill a process, and wait until its parent has taken note of it and its pid is free."""
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.001)

    def worker_below(self) -> ProcessIdentity:
        """A process in a pid namespace below; who it is, it says itself."""
        command = [*OWN_NAMESPACE, sys.executable, "-c", _IDENTIFY]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._ended.callback(worker.communicate)
        assert worker.stdout is not None
        return msgspec.json.decode(worker.stdout.readline(), type=ProcessIdentity)

    def child_with_pid(self, pid: int) -> int:
        """A process that gets a pid that is free, in a namespace that is ours."""
        time.sleep(0.02)  # start times are told in hundredths of a second
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        assert self.child() == pid
        return pid

    def open_device_file(self) -> None:
        """As a process that computes on a GPU has it open."""
        self._ended.enter_context((self.folder / "nvidia0").open("w"))

    def program(self, name: str, text: str) -> None:
        """A shell script on the path."""
        file = self.folder / name
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)

    def cgroup(self, *charged: str, members: tuple[int, ...]) -> Path:
        """A tree of cgroups in which this process's has some lines of dmem.current."""
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        (own,) = [line[3:] for line in lines if line.startswith("0::")]
        root = self.folder / "cgroup"
        folder = root / own.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dmem.current").write_text("".join(f"{line}\n" for line in charged))
        (folder / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in members))
        return root

    def memory(
        self, device: GpuDevice | None = GPU_A, tp_rank: int = 0, **others: Any
    ) -> RankMemory:
        """A rank on the device; without its word, cgroups have no account of GPUs."""
        others = {"cgroups": self.folder / "none", "proof": self.proof, **others}
        return RankMemory(tp_rank, device, **others)

    def close(self) -> None:
        self._ended.close()

    def _say(self, *lines: str) -> None:
        self._lines += lines
        self._script.write_text("".join(f"{line}\n" for line in self._lines))

    def _until_the_end(self, pid: int) -> int:
        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

        self._ended.callback(kill)
        return pid


@contextlib.contextmanager
def _scene() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Scene(Path(folder))) as scene:
        yield scene


def main() -> None:
    module = importlib.import_module(sys.argv[1])
    play = getattr(module, sys.argv[2])
    answers = {}
    for name in sys.argv[3:]:
        path = os.environ["PATH"]
        with _scene() as scene:
            answers[name] = play(getattr(module, name)(scene))
        os.environ["PATH"] = path
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
