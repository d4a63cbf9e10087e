"""FSDP2 with float32 parameters and bfloat16 compute, sharded or in replicas, offloaded or not.

    torchrun --nproc-per-node 2 examples/real_trainers/fsdp2.py --model FOLDER --engine URL

Nothing is gathered: each process offers its shards, cast to what the engine serves in. Only rank 0
speaks with the engine, and only there ENGINE_PLUGINS_ADMIN_TOKEN is needed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine_plugins import WeightSender
from three_steps import SENTENCES, judge, parsed_options, train


def main() -> None:
    options = parsed_options(__doc__)
    dist.init_process_group("gloo")
    mesh = tuple(int(size) for size in options.mesh.split("x"))
    model = sharded(options.model, mesh, offload=options.offload)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    with WeightSender.from_fsdp(model, engines=options.engine, config=model.config) as sender:
        for version, sentence in enumerate(SENTENCES, options.version):
            train(model, tokenizer, optimizer, sentence)
            sender.update(version)  # in bfloat16, as the engine wants each parameter
            weights = whole(model)
            if dist.get_rank() == 0:
                judge(options.engine, options.model, weights.items())
    dist.destroy_process_group()


def sharded(folder: str, mesh: tuple[int, ...], *, offload: bool) -> nn.Module:
    """The model of a folder, layer by layer under fully_shard."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    places = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[-len(mesh) :])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    kept = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()
    for part in (*model.get_submodule("model.layers").children(), model):
        fully_shard(part, mesh=places, mp_policy=policy, offload_policy=kept)
    return model


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole parameters, for the judge alone. Collective."""
    return {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for name, parameter in model.named_parameters()
    }


if __name__ == "__main__":
    main()
