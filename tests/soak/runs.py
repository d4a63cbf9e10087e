"""The runs: the same load alone, beside updates, and beside sleeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos_update.acts import trainer_of
from tests.chaos_update.cases import ServerKind
from tests.chaos_update.clients import ask
from tests.chaos_update.fleet import Target
from tests.chaos_update.models import SHORT, VARIANTS, Models
from tests.chaos_update.trainer import Trainer
from tests.soak.sample import Held, Sampler

__all__ = ["Run", "alone", "kind_of", "sleeps", "updates"]

CLIENTS = 2
TOKENS = 6
UPDATE_S = 60.0


@dataclass(kw_only=True)
class Run:
    """What was seen, step by step.

    Attributes:
        held: before the first step and after each.
        requests: that clients had answered, in all.
        broken: answers that were not whole.
        took_s: all of it.
    """

    held: list[Held] = field(default_factory=list)
    requests: int = 0
    broken: int = 0
    took_s: float = 0.0


class _Load:
    """Clients that ask all the time, and count."""

    def __init__(self, target: Target) -> None:
        self._target, self._over = target, threading.Event()
        self._counting = threading.Lock()
        self.answered = self.broken = 0
        self.threads = [
            threading.Thread(target=self._ask, args=(seed,), daemon=True) for seed in range(CLIENTS)
        ]

    def wait_for(self, requests: int) -> None:
        """Until so many have been answered since the start."""
        while self.answered < requests:
            time.sleep(0.01)

    def end(self) -> None:
        """Ask no more."""
        self._over.set()
        for thread in self.threads:
            thread.join()

    def _ask(self, seed: int) -> None:
        while not self._over.wait(0.05):
            answer = ask(
                self._target.server, SHORT[seed], TOKENS, stream=seed == 0, give_up_s=UPDATE_S
            )
            with self._counting:
                self.answered += 1
                self.broken += bool(answer.broken)


@contextmanager
def _measured(
    target: Target, run: Run, trainer: int | None = None
) -> Iterator[tuple[_Load, Sampler]]:
    load, began = _Load(target), time.monotonic()
    for thread in load.threads:
        thread.start()
    load.wait_for(10 * CLIENTS)  # all processes and threads are there
    sampler = Sampler(target, trainer)
    run.held.append(sampler.look())
    try:
        yield load, sampler
    finally:
        load.end()
        run.requests, run.broken = load.answered, load.broken
        run.took_s = time.monotonic() - began


def alone(target: Target, *, steps: int, requests: int) -> Run:
    """The control: so many requests in so many steps, and nothing else."""
    run = Run()
    with _measured(target, run) as (load, sampler):
        first = load.answered
        for step in range(1, steps + 1):
            load.wait_for(first + requests * step // steps)
            run.held.append(sampler.look())
    return run


def updates(target: Target, models: Models, folder: Path, *, steps: int) -> Run:
    """An update in every step, of one trainer."""
    run = Run()
    trainer = trainer_of(target, models, folder, target.server.url)
    try:
        _update(target, trainer)
        with _measured(target, run, trainer.process.pid) as (_, sampler):
            for _ in range(steps):
                _update(target, trainer)
                run.held.append(sampler.look())
    finally:
        trainer.end()
    return run


def _update(target: Target, trainer: Trainer) -> None:
    version, weights = target.next_version()
    trainer.begin(
        weights=weights, version=version, then=(weights + 1) % VARIANTS, timeout_s=UPDATE_S
    )
    error = trainer.outcome(2 * UPDATE_S).error
    if error:
        raise RuntimeError(f"update {version} of a soak failed: {error}")


def sleeps(target: Target, *, steps: int) -> Run:
    """A sleep and a wake in every step."""
    run = Run()
    admin = target.server.admin
    with _measured(target, run) as (load, sampler):
        for _ in range(steps):
            asked = load.answered
            for path, body in (("/sleep", {"level": 1}), ("/wake", {})):
                answer = admin.post(path, json=body)
                if answer.status_code != 200:
                    raise RuntimeError(f"{path} of a soak failed: {answer.text}")
            load.wait_for(asked + CLIENTS)
            run.held.append(sampler.look())
    return run


def kind_of(engine: str) -> ServerKind:
    """The server that is soaked."""
    return ServerKind(engine=engine, tensor_parallel=1, api_servers=1, wire="tcp", dtype="bfloat16")
