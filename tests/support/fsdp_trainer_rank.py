r"""One process of an FSDP2 trainer: shards a transformers model and updates a live engine.

    python -m tests.support.fsdp_trainer_rank \
        RANK RENDEZVOUS URL TOKEN MESH DIRECTION DTYPE VERSION FOLDER...

MESH is `3` for three shards or `2x2` for two replicas of two, DTYPE what they hold. The weights of
each folder are written into the same sharded parameters in turn and sent, as VERSION and those that
follow it. The process prints each report's version and bytes as JSON, and goes on when it is told
to by a line.
"""

from __future__ import annotations

import json
import sys
from math import prod

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from engine_plugins import WeightSender
from engine_plugins.admin_answers import Direction
from engine_plugins.weights.boxes.dtypes import DTYPES


def sharded(folder: str, mesh: tuple[int, ...], dtype: torch.dtype) -> nn.Module:
    """The model of a folder, layer by layer under fully_shard."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    places = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[-len(mesh) :])
    for layer in model.model.layers:
        fully_shard(layer, mesh=places)
    fully_shard(model, mesh=places)
    return model


def overwrite(model: nn.Module, folder: str) -> None:
    """Write other weights into the shards in place, as an optimizer does."""
    whole = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    with torch.no_grad():
        for name, shard in model.named_parameters():
            assert isinstance(shard, DTensor)
            mesh, placements = shard.device_mesh, shard.placements
            values = whole[name].to(shard.dtype)
            shard.copy_(distribute_tensor(values, mesh, placements, src_data_rank=None))


def main() -> None:
    """Join the others, update once for each folder, say what came of it."""
    global_rank, rendezvous, url, token = sys.argv[1:5]
    mesh = tuple(int(size) for size in sys.argv[5].split("x"))
    direction: Direction = "push" if sys.argv[6] == "push" else "pull"
    dtype = DTYPES[sys.argv[7]]
    first, folders = int(sys.argv[8]), sys.argv[9:]
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(global_rank), world_size=prod(mesh)
    )
    model = sharded(folders[0], mesh, dtype)
    with WeightSender.from_fsdp(
        model, engines=url, token=token, config=model.config, direction=direction
    ) as sender:
        for version, folder in enumerate(folders, first):
            overwrite(model, folder)
            report = sender.update(version)
            print(json.dumps({"version": report.version, "bytes": report.bytes}), flush=True)
            sys.stdin.readline()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
