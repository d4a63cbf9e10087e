r"""Ranks of an FSDP2 trainer of LoRA adapters, a process each, that send the merged model.

    python -m tests.support.lora_trainer_rank WORLD_SIZE RENDEZVOUS_FILE URL

Sends two versions; before each the adapters are written anew. Prints a JSON line for each rank and
version, with the weights whose share is not that of the merged whole.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from engine_plugins import WeightSender
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.fake_engine import TOKEN
from tests.support.process_group import fork_ranks


class _Model(nn.Module):
    """Rows and columns that no three ranks share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.q_proj = nn.Linear(8, 10)
        self.norm = nn.LayerNorm(10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The model's output."""
        found: torch.Tensor = self.norm(self.q_proj(self.embed_tokens(tokens)))
        return found


def run_rank(rank: int, world_size: int, rendezvous: str, url: str) -> None:
    import peft

    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    model, twin = (peft.get_peft_model(_Model(), config) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    with WeightSender.from_fsdp(
        model,
        engines=url,
        token=TOKEN,
        transport=InMemoryTransport(f"trainer-{rank}"),
        merge_lora=True,
    ) as sender:
        for version in (1, 2):
            train(model, twin, seed=version)
            model(torch.tensor([[1, 2]]))  # leaves its root unsharded
            sender.update(version)
            said = {"rank": rank, "version": version, "wrong": wrong(sender, model, twin)}
            sys.stdout.write(json.dumps(said) + "\n")
            sys.stdout.flush()
    dist.destroy_process_group()


def train(model: Any, twin: nn.Module, *, seed: int) -> None:
    """Write the same into the adapters of both, as an optimizer does."""
    model.reshard()
    generator = torch.Generator().manual_seed(seed)
    shards = dict(model.named_parameters())
    with torch.no_grad():
        for name, whole in twin.named_parameters():
            if "lora_" in name:
                whole.copy_(torch.randn(whole.shape, generator=generator))
                shard: Any = shards[name]
                mesh, placements = shard.device_mesh, shard.placements
                shard.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))


def wrong(sender: WeightSender, model: nn.Module, twin: Any) -> list[str]:
    """The tensors whose share here is not the merged whole's."""
    twin.merge_adapter()
    expected = {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): each.detach().clone()
        for name, each in twin.named_parameters()
        if "lora_" not in name
    }
    twin.unmerge_adapter()
    held = [(each.box, each.memory) for each in sender._job.offer.source._placed]
    assert any(isinstance(each, DTensor) for each in model.parameters())
    missing = expected.keys() - {box.name for box, _ in held}
    return [*missing] + [
        box.name
        for box, memory in held
        if not torch.allclose(memory, expected[box.name][box.slices], atol=1e-6)
    ]


def main() -> None:
    world_size, rendezvous, url = sys.argv[1:]
    fork_ranks(run_rank, int(world_size), rendezvous, url)


if __name__ == "__main__":
    main()
