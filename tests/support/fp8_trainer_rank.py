r"""Ranks of an FSDP2 trainer, a process each, that send their weights in block-FP8 form.

    python -m tests.support.fp8_trainer_rank MESH RENDEZVOUS_FILE URL CONFIG VERSIONS

MESH is `3` for three shards or `2x2` for two replicas of two; CONFIG the HF config as JSON. Before
each version all weights are multiplied by -2. Prints one line for each rank and version.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from math import prod

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from engine_plugins import WeightSender
from tests.support.fake_engine import TOKEN

__all__ = ["tiny_model"]


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(200, 300, bias=False)
        self.down_proj = nn.Linear(300, 200)
        self.gate = nn.Linear(200, 4, bias=False)


class _Model(nn.Module):
    """FSDP2 takes nothing that has no forward."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleList(nn.ModuleDict({"mlp": _Mlp()}) for _ in range(2))
        self.model = nn.ModuleDict({"layers": layers})

    def forward(self) -> None:
        """Never called."""


def tiny_model() -> nn.Module:
    """Two layers under HF names, bfloat16; the same in every process."""
    torch.manual_seed(0)
    return _Model().to(torch.bfloat16)


def run_rank(
    rank: int, mesh: tuple[int, ...], rendezvous: str, url: str, config: str, versions: int
) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=prod(mesh)
    )
    model = tiny_model()
    names = ("replicate", "shard")[-len(mesh) :]
    fully_shard(model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names))
    with WeightSender.from_fsdp(
        model, engines=url, token=TOKEN, config=json.loads(config), quantization="fp8"
    ) as sender:
        for version in range(1, versions + 1):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(-2.0)
            sender.update(version)
            print(rank, version, flush=True)
    dist.destroy_process_group()


def main() -> None:
    mesh = tuple(int(size) for size in sys.argv[1].split("x"))
    rendezvous, url, config, versions = sys.argv[2:]
    forks = multiprocessing.get_context("fork")
    ranks = [
        forks.Process(
            target=run_rank, args=(rank, mesh, rendezvous, url, config, int(versions)), daemon=True
        )
        for rank in range(prod(mesh))
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))


if __name__ == "__main__":
    main()
