"""A trainer in a process of its own, to be stopped or killed: it offers the weights of a folder.

Run as a script it is the trainer; imported it gives `TrainerProcess`, the handle to one. The
manifest comes back over a pipe, because UCX writes its log lines to stdout.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
READY_S = 120.0


class TrainerProcess:
    """A running trainer and its manifest, as msgpack bytes."""

    def __init__(self, model: Path, environment: dict[str, str]) -> None:
        self._link, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), str(model)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        if not self._link.poll(READY_S):
            self.end()
            raise RuntimeError("the trainer process did not offer its weights")
        self.manifest = self._link.recv_bytes()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; a killed trainer is also waited for."""
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(10)

    def end(self) -> None:
        """Kill it, stopped or not."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(10)
        self._link.close()


@contextlib.contextmanager
def trainer_process(model: Path, **environment: str) -> Iterator[TrainerProcess]:
    """A trainer for as long as a context lasts."""
    trainer = TrainerProcess(model, environment)
    try:
        yield trainer
    finally:
        trainer.end()


def _main() -> None:
    from safetensors.torch import load_file

    from engine_plugins.weights.source import WeightSource
    from engine_plugins.weights.torch_source import hf_boxes
    from engine_plugins.weights.transport.nixl import NixlTransport

    link = Connection(int(sys.argv[1]))
    tensors = load_file(Path(sys.argv[2]) / "model.safetensors")
    transport = NixlTransport(f"trainer-{os.getpid()}-{secrets.token_hex(4)}")
    source = WeightSource(hf_boxes(tensors), transport, source=f"trainer process {os.getpid()}")
    link.send_bytes(source.manifest_bytes)
    with contextlib.suppress(EOFError):
        link.recv_bytes()


if __name__ == "__main__":
    _main()
