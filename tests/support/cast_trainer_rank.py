r"""Ranks of an FSDP2 trainer, a process each, whose engine wants other dtypes than they hold.

    python -m tests.support.cast_trainer_rank WORLD_SIZE RENDEZVOUS_FILE URL

Sends two versions. Prints a JSON line for each rank and version.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from engine_plugins import WeightSender
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.fake_engine import TOKEN
from tests.support.process_group import fork_ranks


class _Model(nn.Module):
    """Of `short` the last ranks hold no row."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 5))
        self.short = nn.Parameter(torch.randn(1, 5))
        self.router = nn.Parameter(torch.randn(4, 5))

    def forward(self) -> None:
        """Never called; FSDP2 takes nothing that has none."""


def run_rank(rank: int, world_size: int, rendezvous: str, url: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    model = _Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    transport = InMemoryTransport(f"trainer-{rank}")
    with WeightSender.from_fsdp(model, engines=url, token=TOKEN, transport=transport) as sender:
        for version in (1, 2):
            report = sender.update(version)
            said = {"rank": rank, "version": version, "slots": report.slot_bytes}
            sys.stdout.write(json.dumps(said) + "\n")
            sys.stdout.flush()
    dist.destroy_process_group()


def main() -> None:
    world_size, rendezvous, url = sys.argv[1:]
    fork_ranks(run_rank, int(world_size), rendezvous, url)


if __name__ == "__main__":
    main()
