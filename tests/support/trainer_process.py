"""A trainer in a process of its own, to be stopped or killed: it offers the weights of a folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import httpx
from safetensors.torch import load_file

from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.nixl import NixlTransport
from tests.support.forked_process import ForkedProcess
from tests.support.waiting import until

READY_S = 120.0
MSGPACK = {"content-type": "application/msgpack"}


class TrainerProcess:
    """A running trainer.

    Attributes:
        manifest: what it offers, as msgpack bytes.
        unharmed: whether no signal was sent to it yet.
    """

    def __init__(self, model: Path, environment: dict[str, str]) -> None:
        self._link, theirs = Pipe()
        self.process = ForkedProcess(
            _offer, (theirs, model), log=Path(os.devnull), environment=environment
        )
        theirs.close()
        if not self._link.poll(READY_S):
            self.end()
            raise RuntimeError("the trainer process did not offer its weights")
        self.manifest = self._link.recv_bytes()
        self.unharmed = True

    @property
    def name(self) -> str:
        """How its agent's name begins."""
        return f"trainer-{self.process.pid}-"

    def connect(self, admin: httpx.Client) -> str:
        """Publish the manifest and have an engine plan an update from it; the plan's id."""
        published = admin.post("/weights/sources", content=self.manifest, headers=MSGPACK)
        ids = [published.json()["source_id"]]
        connected = admin.post("/weights/connect", json={"source_ids": ids})
        assert connected.status_code == 200, connected.text
        return str(connected.json()["plan_id"])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; a trainer that is killed or stopped is also waited for."""
        self.unharmed = False
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait(10)
        elif number == signal.SIGSTOP:
            # One thread takes the signal and stops the others. On a busy machine that thread waits
            # for a core, and until then the wire's thread goes on giving bytes.
            until(self._stands_still, otherwise=lambda: "the trainer does not stop")

    def _stands_still(self) -> bool:
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/stat")
        return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in threads)

    def end(self) -> None:
        """Kill it, stopped or not."""
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


class TrainerPool:
    """Gives the same trainer again, for as long as nobody has hurt it."""

    def __init__(self) -> None:
        self._trainer: TrainerProcess | None = None

    def unharmed(self, model: Path, **environment: str) -> TrainerProcess:
        """A trainer that offers the weights of a folder."""
        if self._trainer is None or not self._trainer.unharmed:
            self.close()
            self._trainer = TrainerProcess(model, environment)
        return self._trainer

    def close(self) -> None:
        """End the trainer, if there is one."""
        if self._trainer is not None:
            self._trainer.end()
            self._trainer = None


def _offer(link: Connection, model: Path) -> None:
    """Offer the weights until the other end of the link is closed."""
    tensors = load_file(model / "model.safetensors")
    transport = NixlTransport(f"trainer-{os.getpid()}-{secrets.token_hex(4)}")
    source = WeightSource(hf_boxes(tensors), transport, source=f"trainer process {os.getpid()}")
    link.send_bytes(source.manifest_bytes)
    with contextlib.suppress(EOFError):
        link.recv_bytes()
