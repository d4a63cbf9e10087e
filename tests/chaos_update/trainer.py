"""A trainer in a process of its own: it updates an engine, and takes its next step at once."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch

from engine_plugins import WeightSender
from tests.chaos_update.models import Models, tensors_of
from tests.support.engine_server import TOKEN
from tests.support.forked_process import ForkedProcess

__all__ = ["Outcome", "Trainer"]

READY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What `update()` came to, as the trainer saw it.

    Attributes:
        error: of an update that failed, was left, or whose trainer died.
        took_s: from the call until it gave control back.
    """

    error: str = ""
    took_s: float = 0.0


class Trainer:
    """The other end of a trainer process.

    Args:
        models: whose weights it may hold.
        dtype: of its tensors.
        url: the engine, or the proxy in front of it.
        two_phase: whether it prepares before it commits.
        environment: what is added to its environment.
        log: where its output goes.
    """

    def __init__(
        self,
        models: Models,
        *,
        dtype: str,
        url: str,
        log: Path,
        two_phase: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._link, theirs = Pipe()
        self.process = ForkedProcess(
            _train,
            (theirs, models, dtype, url, two_phase),
            log=log,
            environment={"UCX_NET_DEVICES": "lo", "OMP_NUM_THREADS": "1", **(environment or {})},
        )
        theirs.close()
        if not self._link.poll(READY_S):
            self.end()
            raise RuntimeError("the trainer did not start")
        self._link.recv()

    def begin(self, *, weights: int, version: int, then: int, **options: Any) -> None:
        """Begin an update to a version with some weights; its step after it brings others."""
        self._link.send({"weights": weights, "version": version, "then": then, **options})

    @property
    def answered(self) -> bool:
        """Whether `update()` has given control back, or the trainer is gone."""
        return self._link.poll(0)

    def outcome(self, within_s: float) -> Outcome:
        """What became of it; the next step's tensors are written by now."""
        try:
            if self._link.poll(within_s):
                return Outcome(**self._link.recv())
        except (EOFError, OSError):
            return Outcome(error="the trainer died")
        return Outcome(error=f"no end within {within_s:g} s")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def end(self) -> None:
        """Kill it, stopped or not."""
        self.process.kill()
        self.process.wait(10)
        self._link.close()


class _WatchdogError(Exception):
    """An exception of the training loop's own, out of a signal handler."""


def _train(link: Connection, models: Models, dtype: str, url: str, two_phase: bool) -> None:
    signal.signal(signal.SIGUSR1, _watchdog)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    held = tensors_of(models.file(0), getattr(torch, dtype))
    with WeightSender.from_hf(
        list(held.items()), engines=url, token=TOKEN, two_phase=two_phase or None, progress=False
    ) as sender:
        link.send("ready")
        while True:
            try:
                asked = link.recv()
            except EOFError:
                return
            _write(held, models.file(asked.pop("weights")))
            after = models.file(asked.pop("then"))
            link.send(_updated(sender, held, after, asked))


def _updated(
    sender: WeightSender, held: dict[str, torch.Tensor], after: Path, asked: dict[str, Any]
) -> dict[str, Any]:
    """Update, however it ends, and write the next step's weights in place at once."""
    began, error = time.monotonic(), ""
    try:
        sender.update(**asked)
    except (Exception, KeyboardInterrupt) as failure:
        error = f"{type(failure).__name__}: {failure}"
    took_s = time.monotonic() - began
    _write(held, after)
    return {"error": error, "took_s": took_s}


def _write(held: dict[str, torch.Tensor], file: Path) -> None:
    """As an optimizer does: in place, and one tensor after the other."""
    from safetensors import safe_open

    with safe_open(file, "pt") as found:
        for name, tensor in held.items():
            tensor.copy_(found.get_tensor(name))


def _watchdog(*_: object) -> None:
    raise _WatchdogError("the training loop's watchdog")
