"""How much of the wire the receiver gets: our pull beside raw NIXL, and beside ModelExpress.

256 MiB as 400 and as 18,867 tensors, from one trainer process, over the same ranges and the same
UCX settings. Raw: one prepared NIXL transfer of all ranges, spun on until done. ModelExpress: its
own receive path (`modelexpress_rank.py`). Ours: the receiver's own fetch, module by module, into
an arena that holds them all (staged, the fair pair: the others' buffers are as large) or into its
bounded one (in place). Seconds from the first post until every byte is there, and the receiving
process's CPU time, which says more where other work shares the cores.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.memory.arena import Arena
from engine_plugins.weights.planning.logical_tensors import logical_tensors
from engine_plugins.weights.planning.plan import build_plan, coalesced
from engine_plugins.weights.planning.plan_data import FetchPlan
from engine_plugins.weights.planning.ring import schedule
from engine_plugins.weights.receiving.prepared_fetch import PreparedFetch
from engine_plugins.weights.transport.base import Descriptors, Transport
from engine_plugins.weights.transport.nixl import NixlTransport
from tests.benchmarks.clock import Clock, Cost
from tests.benchmarks.modelexpress_rank import ModelExpressRank
from tests.benchmarks.wire_models import BYTES, MODELS, engine_modules
from tests.support.trainer_process import trainer_process

__all__ = ["wire_share"]


class Contender(Protocol):
    """Something that pulls the whole model, again and again."""

    def run(self) -> Cost:
        """Pull everything once."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


def wire_share(folder: Path, *, pairs: int) -> Table:
    """The table, for CMA (UCX's own choice on one host) and for tcp."""
    table = Table(title=f"pull of {BYTES >> 20} MiB, {pairs} rounds")
    for column in ("UCX_TLS", "tensors", "who", "GB/s", "CPU ms", "/ raw", "spread", "/ ModelExp."):
        table.add_column(column, justify="right")
    for model in MODELS:
        tensors = model.tensors()
        save_file(tensors, folder / "model.safetensors")
        for wires in (None, "tcp"):
            costs = _rounds(folder, tensors, wires, pairs)
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            for row in _rows(costs, nbytes):
                table.add_row(wires or "unset (CMA)", f"{len(tensors)}", *row)
            table.add_section()
    return table


def _rows(costs: dict[str, list[Cost]], nbytes: int) -> list[list[str]]:
    """One row for each contender: medians, and medians of the ratios within a round."""
    rows = []
    for who, own in costs.items():
        to_raw = sorted(_ratios(costs["raw"], own))
        rows.append(
            [
                who,
                f"{nbytes / 1e9 / statistics.median(cost.seconds for cost in own):.2f}",
                f"{statistics.median(cost.cpu_s for cost in own) * 1e3:.0f}",
                f"{statistics.median(to_raw):.3f}",
                f"{to_raw[0]:.2f}-{to_raw[-1]:.2f}",
                f"{statistics.median(_ratios(costs['ModelExpress'], own)):.2f}",
            ]
        )
    return rows


def _ratios(other: Sequence[Cost], own: Sequence[Cost]) -> list[float]:
    """How many times as fast as another one, round by round."""
    return [theirs.seconds / mine.seconds for theirs, mine in zip(other, own, strict=True)]


def _rounds(
    folder: Path, tensors: dict[str, torch.Tensor], wires: str | None, pairs: int
) -> dict[str, list[Cost]]:
    """What every contender's pulls cost; they take turns, and their first is not counted."""
    os.environ.pop("UCX_TLS", None)
    if wires is not None:
        os.environ["UCX_TLS"] = wires
    with ExitStack() as stack:
        trainer = stack.enter_context(trainer_process(folder))
        manifest = msgspec.msgpack.decode(trainer.manifest, type=SourceManifest)
        plan = build_plan([manifest], coalesced(engine_modules(logical_tensors([manifest]))))
        rows = _all_ranges(plan)
        rival = ModelExpressRank(manifest.agent_metadata, rows, plan.total_bytes)
        stack.callback(rival.close)
        transport = NixlTransport(f"bench-{os.getpid()}-{secrets.token_hex(3)}")
        stack.callback(transport.close)
        raw = _Raw(transport, manifest, rows, plan.total_bytes)
        stack.callback(raw.close)
        contenders: dict[str, Contender] = {"raw": raw, "ModelExpress": rival}
        for mode in ("staged", "in place"):
            ours = _Ours(transport, manifest, plan, staged=mode == "staged")
            stack.callback(ours.close)
            contenders[f"ours, {mode}"] = ours
            ours.run()
            ours.check(tensors)
        rival.run()
        raw.run()
        assert raw.digest() == rival.digest(), "ModelExpress holds other bytes than raw NIXL"
        costs: dict[str, list[Cost]] = {who: [] for who in contenders}
        for number in range(pairs):
            gc.collect()
            for who in _turned(list(contenders), number):
                costs[who].append(contenders[who].run())
        return costs


def _turned(names: Sequence[str], number: int) -> list[str]:
    """The names, another one first in each round."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def _all_ranges(plan: FetchPlan) -> Descriptors:
    """[n, 3] every range of a plan: offset in a buffer of the whole model, address, bytes."""
    windows = schedule([step.nbytes for step in plan.steps], plan.total_bytes)
    tables = []
    for step, window in zip(plan.steps, windows, strict=True):
        (read,) = step.reads
        tables.append(read.descriptors + np.array([window.offset_bytes, 0, 0], dtype=np.uint64))
    return np.concatenate(tables)


class _Raw:
    """All ranges in one prepared transfer."""

    def __init__(
        self, transport: Transport, manifest: SourceManifest, rows: Descriptors, nbytes: int
    ) -> None:
        transport.add_peer(manifest.agent, manifest.agent_metadata)
        self._arena = Arena(nbytes, transport)
        self._bytes = self._arena.tensor(0, (nbytes,), torch.uint8)
        self._bytes.zero_()
        placed = rows + np.array([self._arena.address, 0, 0], dtype=np.uint64)
        self._read = transport.prepare_read(
            manifest.agent, placed, local_device=-1, remote_device=-1
        )

    def run(self) -> Cost:
        clock = Clock()
        self._read.post()
        while not self._read.done():
            time.sleep(0)
        return clock.cost()

    def digest(self) -> bytes:
        return hashlib.blake2b(self._bytes.numpy().data).digest()

    def close(self) -> None:
        self._read.release()
        del self._bytes
        self._arena.close()


class _Ours:
    """The receiver's fetch, every step as soon as there is room."""

    def __init__(
        self, transport: Transport, manifest: SourceManifest, plan: FetchPlan, *, staged: bool
    ) -> None:
        self._fetch = PreparedFetch(plan, [manifest], transport, staged=staged)

    def run(self) -> Cost:
        clock, done = Clock(), 0
        self._fetch.reset_counters()
        while done < len(self._fetch.plan.steps):
            steps = self._fetch.steps_with_room(done, installed=done)
            self._fetch.run_steps(
                steps,
                stall_timeout_s=60,
                deadline=time.monotonic() + 120,
                cancelled=lambda: False,
            )
            done = steps.stop
        return clock.cost()

    def check(self, tensors: dict[str, torch.Tensor]) -> None:
        """Compare what lies in the arena: all of it when staged, else the last step."""
        last = len(self._fetch.plan.steps)
        for index in range(0 if self._fetch.staged else last - 1, last):
            for name, tensor in self._fetch.tensors(index):
                assert torch.equal(tensor, tensors[name]), name

    def close(self) -> None:
        self._fetch.close()


def main() -> None:
    """Print the table; runs in `.venv/megatron`, which holds ModelExpress."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory(prefix="engine-plugins-bench-") as folder:
        Console(width=100).print(wire_share(Path(folder), pairs=pairs))


if __name__ == "__main__":
    main()
