"""Trainer ranks of a gloo group, a process each: run a script of updates, say how each ended.

    python -m tests.support.sender_rank WORLD_SIZE RENDEZVOUS_FILE URL[,URL] STEP...

Steps: `update:N`, `bad:RANK:N` (that rank's tensors raise ValueError), `gone:RANK:N` (they raise
SourceError), `swap:RANK:N` (they move first), `versions` (each rank asks for another),
`die:RANK:N` (that rank ends instead), `interrupt:RANK:N` (that rank gets a SIGINT half a second
later), `outside:RANK:N` (that rank raises where no step of the ranks runs). Prints one JSON line
per rank and step, with what its version word held afterwards. With `FAN_OUT` in the environment
the engines feed each other; `PUBLISH` is the option of that name; with `ALONE` ranks but the first
have no token and no url that leads anywhere, and may make no client. The ranks are forks of one
process, which imports torch once; it ends as badly as they do.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from engine_plugins.admin_client import AdminClient
from engine_plugins.errors import EnginePluginError, SourceError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.fake_engine import TOKEN

DIED = 3
FAILURES = {
    "bad": ValueError("the optimizer lost this shard"),
    "gone": SourceError("w: its memory is gone"),
}


class Trainer:
    """Half of a tensor's rows, and switches to misbehave."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.data = torch.randn(4, 8)
        self.failure: Exception | None = None

    def boxes(self) -> Sequence[SourceBox]:
        if self.failure is not None:
            raise self.failure
        shape = (4 * self.world_size, 8)
        start = (4 * self.rank, 0)
        return [SourceBox(name="w", global_shape=shape, start=start, data=self.data)]


def run(sender: WeightSender, trainer: Trainer, step: str) -> dict[str, Any]:
    kind, *numbers = step.split(":")
    version = int(numbers[-1]) if numbers else 1000 + trainer.rank
    chosen = len(numbers) == 2 and int(numbers[0]) == trainer.rank
    if kind == "die" and chosen:
        os._exit(DIED)
    if kind == "swap" and chosen:
        trainer.data = torch.randn(4, 8)
    if kind == "interrupt" and chosen:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    if kind == "outside" and chosen:
        sender._job._gather = lambda: 1 / 0  # type: ignore[method-assign, assignment]
    trainer.failure = FAILURES.get(kind) if chosen else None
    source = sender._job.offer._source
    word = None if source is None else source._word
    started = time.monotonic()
    try:
        said: dict[str, Any] = {"report": str(sender.update(version))}
    except EnginePluginError as error:
        said = {"kind": type(error).__name__, "error": str(error)}
    except (KeyboardInterrupt, ZeroDivisionError) as error:
        said = {"kind": type(error).__name__}
    if kind == "outside" and chosen:
        del sender._job._gather
    if word is not None:
        said["word"] = ctypes.c_uint64.from_address(word.address).value
    return {"rank": trainer.rank, "step": step, "s": time.monotonic() - started, **said}


def no_client(*_: object, **__: object) -> None:
    raise AssertionError("a rank that does not lead made a client")


def run_rank(rank: int, world_size: int, rendezvous: str, urls: str, steps: list[str]) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    trainer = Trainer(rank, world_size)
    knows = not rank or "ALONE" not in os.environ
    if not knows:
        AdminClient.__init__ = no_client  # type: ignore[method-assign]
    transport = InMemoryTransport(f"trainer-{rank}")
    with WeightSender(
        trainer.boxes,
        engines=urls.split(",") if knows else "http://127.0.0.1:1",
        token=TOKEN if knows else None,
        publish="each_rank" if os.environ.get("PUBLISH") == "each_rank" else "leading_rank",
        transport=transport,
        fan_out=int(os.environ["FAN_OUT"]) if "FAN_OUT" in os.environ else None,
    ) as sender:
        for step in steps:
            sys.stdout.write(json.dumps(run(sender, trainer, step)) + "\n")
            sys.stdout.flush()


def main() -> None:
    world_size, rendezvous, urls, *steps = sys.argv[1:]
    forks = multiprocessing.get_context("fork")
    ranks = [
        forks.Process(
            target=run_rank, args=(rank, int(world_size), rendezvous, urls, steps), daemon=True
        )
        for rank in range(int(world_size))
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode not in (0, DIED) for rank in ranks))


if __name__ == "__main__":
    main()
