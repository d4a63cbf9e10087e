"""Ranks of a gloo group that meet, and one that does not behave: how each of them ended.

    python -m tests.support.meeting_rank WORLD_SIZE RENDEZVOUS_FILE CASE RANK[,RANK]

Prints one JSON line for each of these ranks, whose processes live on until all have said how they
ended, as a notebook or an actor does; the others are killed then.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from engine_plugins.errors import EnginePluginError
from engine_plugins.sender import ranks as ranks_module
from engine_plugins.sender.ranks import TrainerRanks
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.transport.in_memory import InMemoryTransport

BAD = 1
"""The rank that misbehaves."""
TOLD_BYTES = 16 << 20
WAIT_S = 40.0

Case = Callable[[int], Any]


class Unreadable:
    """No config that anybody could read."""

    def __getattr__(self, name: str) -> Any:
        raise LookupError("this config is on a disk that is gone")


def _named(rank: int, error: BaseException) -> Iterator[tuple[str, torch.Tensor]]:
    yield "w", torch.zeros(4)
    if rank == BAD:
        raise error


def _made(rank: int, named: Any, **more: Any) -> None:
    WeightSender.from_hf(
        named,
        engines="http://127.0.0.1:1",
        token="x",
        transport=InMemoryTransport(f"trainer-{rank}"),
        **more,
    ).close()


def generator(rank: int) -> None:
    _made(rank, _named(rank, RuntimeError("this rank cannot read one of its tensors")))


def function(rank: int) -> None:
    _made(rank, lambda: _named(rank, RuntimeError("this rank cannot read one of its tensors")))


def config(rank: int) -> None:
    _made(rank, {"w": torch.zeros(4)}, config=Unreadable() if rank == BAD else None)


def quantization(rank: int) -> None:
    told = {"quantization_config": {"quant_method": "awq"}} if rank == BAD else None
    _made(rank, {"w": torch.zeros(4)}, config=told, quantization="fp8")


def interrupt(rank: int) -> None:
    _made(rank, lambda: _named(rank, KeyboardInterrupt()))


def leave(rank: int) -> None:
    _made(rank, lambda: _named(rank, SystemExit(4)))


def option(rank: int) -> None:
    _made(rank, {"w": torch.zeros(4)}, meet_timeout_s="soon" if rank == BAD else 30)


def between(rank: int) -> None:
    """It raises where no step runs."""
    ranks = TrainerRanks()
    with ranks.together("updating"):
        if rank == BAD:
            raise ZeroDivisionError("outside of any step")
        ranks.agree("stepping", lambda: rank, int)


def waiting(rank: int) -> None:
    """Rank 0 is interrupted while it waits for the rank that takes its time."""
    ranks = TrainerRanks()
    if rank == 0:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with ranks.together("updating"):
        ranks.agree("stepping", lambda: time.sleep(4.0 * (rank == BAD)), None)


def unpackable(rank: int) -> None:
    TrainerRanks().agree("stepping", lambda: object() if rank == BAD else rank, int)


def absent(rank: int) -> None:
    if rank == BAD:
        time.sleep(WAIT_S)
    TrainerRanks(meet_timeout_s=1.0)


def leader_absent(rank: int) -> None:
    if rank == 0:
        time.sleep(WAIT_S)
    TrainerRanks(meet_timeout_s=1.0)


def late(rank: int) -> None:
    """It never comes to the second update."""
    ranks_module.STEP_WAIT_S = 2.0
    ranks = TrainerRanks(meet_timeout_s=0.5)
    ranks.agree("starting", lambda: rank, int, between_steps=True)
    if rank == BAD:
        time.sleep(WAIT_S)
    ranks.agree("starting", lambda: rank, int, between_steps=True)


def anew(rank: int) -> list[int]:
    """After one was interrupted they meet again, and are as many as before."""
    ranks = TrainerRanks()
    try:
        with ranks.together("updating"):
            if rank == BAD:
                raise KeyboardInterrupt
            ranks.agree("stepping", lambda: rank, int)
    except (KeyboardInterrupt, EnginePluginError):
        pass
    return ranks.agree("stepping", lambda: rank, int)


def again(rank: int) -> int:
    """Senders come and go in one job."""
    met = 0
    for _ in range(6):
        ranks = TrainerRanks()
        met += len(ranks.agree("stepping", lambda: rank, int))
        ranks.close()
    return met


def alone(rank: int) -> int:
    group = dist.new_group([0], use_local_synchronization=True) if rank == 0 else None
    return TrainerRanks(group).count if rank == 0 else 0


def outsider(rank: int) -> None:
    """Who is not of the group that was given."""
    group = dist.new_group([0])
    TrainerRanks(group, meet_timeout_s=1.0)


def told(rank: int) -> dict[str, int]:
    """What is told to all, and what it took."""
    ranks = TrainerRanks()
    ranks.lead("telling", lambda: b"x", bytes)
    before = _peak()
    size = len(ranks.lead("telling", lambda: b"x" * TOLD_BYTES, bytes))
    return {"size": size, "peak": _peak() - before}


def dealt(rank: int) -> dict[str, int]:
    """Each rank's own part, and what it took."""
    ranks = TrainerRanks()
    parts = lambda: [bytes([place]) * TOLD_BYTES for place in range(ranks.count)]  # noqa: E731
    before = _peak()
    mine = ranks.deal("dealing", parts, bytes)
    return {"size": len(mine), "first": mine[0], "last": mine[-1], "peak": _peak() - before}


def collected(rank: int) -> list[list[int]]:
    """Results of uneven length in bounded batches; of one rank there is none."""
    ranks_module.BATCH_BYTES = 3000
    ranks = TrainerRanks()
    batches: list[list[int]] = []

    def take(got: Mapping[int, Any]) -> None:
        batches.append([n for place, data in got.items() for n in (place, len(data))])
        assert all(bytes(data) == bytes([place]) * len(data) for place, data in got.items())

    sizes = [1000, 0, 2500, 400]
    ranks.collect("collecting", lambda: bytes([rank]) * sizes[rank], take, most=8)
    return batches


def refused(rank: int) -> None:
    """The leading rank cannot take what it was given."""

    def take(got: Mapping[int, Any]) -> None:
        raise ValueError("no engine takes this")

    TrainerRanks().collect("collecting", lambda: b"x", take, most=8)


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        generator,
        function,
        config,
        quantization,
        interrupt,
        leave,
        option,
        between,
        waiting,
        unpackable,
        absent,
        leader_absent,
        late,
        anew,
        again,
        alone,
        outsider,
        told,
        dealt,
        collected,
        refused,
    )
}


def _peak() -> int:
    """Highest resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_rank(rank: int, world_size: int, rendezvous: str, case: str, said: Any) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    dist.barrier()
    began = time.monotonic()
    how: dict[str, Any]
    try:
        how = {"value": CASES[case](rank)}
    except EnginePluginError as error:
        how = {"kind": type(error).__name__, "error": str(error)}
    except BaseException as error:
        how = {"kind": type(error).__name__, "error": repr(error)}
    said.put({"rank": rank, "s": time.monotonic() - began, **how})
    time.sleep(WAIT_S)


def main() -> None:
    world_size, rendezvous, case, heard = sys.argv[1:]
    forks = multiprocessing.get_context("fork")
    said: Any = forks.Queue()
    processes = [
        forks.Process(
            target=run_rank, args=(rank, int(world_size), rendezvous, case, said), daemon=True
        )
        for rank in range(int(world_size))
    ]
    for process in processes:
        process.start()
    waited_for = {int(rank) for rank in heard.split(",")}
    try:
        while waited_for:
            how = said.get(timeout=WAIT_S)
            waited_for.discard(how["rank"])
            sys.stdout.write(json.dumps(how) + "\n")
    except queue.Empty:
        sys.exit(f"ranks {sorted(waited_for)} still wait")
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    main()
