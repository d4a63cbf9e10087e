"""A push beside a pull: the same tensors, the same plan, the same two processes, in turn.

This process is the trainer, a child the engine's rank. The child pulls the whole model into a
receive buffer, or this process writes it into another one as large. Both are staged, and prepared
once; seconds from the first post until every byte is there. Bytes are compared afterwards.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import msgspec
import torch
from rich.table import Table

from engine_plugins.sender.peer_writes import PeerWrites
from engine_plugins.weights.contract.destinations import Destination
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.planning.logical_tensors import logical_tensors
from engine_plugins.weights.planning.plan import build_plan, coalesced, laid_apart
from engine_plugins.weights.receiving.prepared_fetch import PreparedFetch
from engine_plugins.weights.receiving.prepared_push import PreparedPush
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.nixl import NixlTransport
from engine_plugins.weights.transport.transfers import run_transfers
from tests.benchmarks.clock import Clock, Cost
from tests.benchmarks.wire_models import MODELS, engine_modules

__all__ = ["push_beside_pull"]

DEADLINE_S = 120.0


def push_beside_pull(*, pairs: int) -> Table:
    """The table, for CMA (UCX's own choice on one host) and for tcp."""
    table = Table(title=f"push beside pull, {pairs} rounds")
    for column in ("UCX_TLS", "tensors", "who", "GB/s", "CPU ms, trainer", "engine", "/ pull"):
        table.add_column(column, justify="right")
    for model in MODELS:
        tensors = model.tensors()
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        for wires in (None, "tcp"):
            costs = _rounds(tensors, wires, pairs)
            for who, own in costs.items():
                seconds = statistics.median(both[0].seconds for both in own)
                cpu = [statistics.median(both[side].cpu_s for both in own) for side in (0, 1)]
                ratios = [
                    pull[0].seconds / mine[0].seconds
                    for pull, mine in zip(costs["pull"], own, strict=True)
                ]
                table.add_row(
                    wires or "unset (CMA)",
                    f"{len(tensors)}",
                    who,
                    f"{nbytes / 1e9 / seconds:.2f}",
                    *(f"{each * 1e3:.0f}" for each in cpu),
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                )
        table.add_section()
    return table


def _rounds(
    tensors: dict[str, torch.Tensor], wires: str | None, pairs: int
) -> dict[str, list[tuple[Cost, Cost]]]:
    """What each took this process and the child; they take turns, the first is not counted."""
    os.environ.pop("UCX_TLS", None)
    if wires is not None:
        os.environ["UCX_TLS"] = wires
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="push-bench-")))
        transport = NixlTransport(f"bench-trainer-{os.getpid()}-{secrets.token_hex(3)}")
        stack.callback(transport.close)
        source = stack.enter_context(WeightSource(hf_boxes(tensors), transport))
        (folder / "manifest").write_bytes(source.manifest_bytes)
        child = _Child(folder)
        stack.callback(child.close)
        told = msgspec.msgpack.decode((folder / "destination").read_bytes(), type=Destination)
        transport.add_peer(told.agent, told.agent_metadata)
        writes = PeerWrites("the engine", told.agent, transport)
        stack.callback(writes.release, ended=True)
        for local, remote, rows in told.writes[transport.agent].by_devices():
            writes.add(rows, local_device=local, remote_device=remote)
        costs: dict[str, list[tuple[Cost, Cost]]] = {"pull": [], "push": []}
        for _ in range(pairs + 1):
            costs["pull"].append(child.pull())
            costs["push"].append(child.idle_while(writes))
        expected = _digest(sorted(tensors.items()))
        assert child.digests() == [expected, expected], "bytes differ"
        return {who: each[1:] for who, each in costs.items()}


class _Child:
    """The engine's rank, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._ask("ready") == ["ready"]

    def pull(self) -> tuple[Cost, Cost]:
        """Seconds are the child's own: from its first post on."""
        clock = Clock()
        seconds, cpu_s = map(float, self._ask("pull"))
        return Cost(seconds, clock.cost().cpu_s), Cost(seconds, cpu_s)

    def idle_while(self, writes: PeerWrites) -> tuple[Cost, Cost]:
        """Push."""
        (before,) = map(float, self._ask("cpu"))
        clock = Clock()
        writes.begin()
        run_transfers(writes.writes, deadline_s=DEADLINE_S)
        mine = clock.cost()
        (after,) = map(float, self._ask("cpu"))
        return mine, Cost(mine.seconds, after - before)

    def digests(self) -> list[str]:
        """Of what was pulled, and of what was pushed."""
        return self._ask("digests")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _ask(self, what: str) -> list[str]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(what + "\n")
        process.stdin.flush()
        return process.stdout.readline().split()


def _digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.blake2b()
    for _, tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _landed(prepared: PreparedFetch | PreparedPush) -> str:
    steps = range(len(prepared.plan.steps))
    return _digest(sorted(each for step in steps for each in prepared.tensors(step)))


def main() -> None:
    """Play the engine's rank until stdin ends."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    manifest = msgspec.msgpack.decode((folder / "manifest").read_bytes(), type=SourceManifest)
    plan = build_plan([manifest], coalesced(engine_modules(logical_tensors([manifest]))))
    transport = NixlTransport(f"bench-engine-{os.getpid()}-{secrets.token_hex(3)}")
    fetch = PreparedFetch(plan, [manifest], transport, staged=True)
    push = PreparedPush(laid_apart(plan), [manifest], transport)
    (folder / "destination").write_bytes(msgspec.msgpack.encode(push.destination(0)))

    def pull() -> str:
        clock, done = Clock(), 0
        while done < len(plan.steps):
            steps = fetch.steps_with_room(done, installed=done)
            deadline = time.monotonic() + DEADLINE_S
            fetch.run_steps(steps, stall_timeout_s=60, deadline=deadline, cancelled=lambda: False)
            done = steps.stop
        cost = clock.cost()
        return f"{cost.seconds} {cost.cpu_s}"

    answers = {
        "ready": lambda: "ready",
        "pull": pull,
        "cpu": lambda: str(time.process_time()),
        "digests": lambda: f"{_landed(fetch)} {_landed(push)}",
    }
    for line in sys.stdin:
        print(answers[line.strip()](), flush=True)
    fetch.close()
    push.close()
    transport.close()


if __name__ == "__main__":
    main()
