"""Four gloo processes that cut tensors in every way and offer their shares.

    python -m tests.support.dtensor_rank FOLDER

For each case all ranks' boxes are put together on every rank and compared with what torch itself
gathers. Each rank writes to FOLDER/RANK.json what was wrong by case (null: nothing). The ranks are
forks of one process, which imports torch's many modules once.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from engine_plugins.errors import UnsupportedError
from engine_plugins.weights.boxes.placement import SourceBox, assemble
from engine_plugins.weights.sources.dtensor_source import is_dtensor
from engine_plugins.weights.sources.fsdp_source import fsdp_tensors
from engine_plugins.weights.sources.hf_offer import HfOffer
from engine_plugins.weights.sources.torch_source import hf_boxes
from tests.families.catalogue import family_named
from tests.families.maker import random_model

__all__ = ["CASES"]

WORLD_SIZE = 4
Tensors = Mapping[str, torch.Tensor]
Case = Callable[[], str | None]


class Mlp(nn.Module):
    """Two layers; rows and columns may divide by nothing."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)
        self.register_buffer("scale", torch.randn(3))
        self.register_buffer("cache", torch.randn(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def model_of(width: int, inner: int) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(Mlp(width, inner), Mlp(width, inner))


def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    if shape == (2,):  # every process makes it, and two are no part of it
        return DeviceMesh("cpu", [0, 1], mesh_dim_names=names)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def together(boxes: list[SourceBox]) -> dict[str, torch.Tensor]:
    """The whole tensors, from the boxes of all ranks."""
    said: list[Any] = [None] * WORLD_SIZE
    mine = [(box.name, box.global_shape, box.start, box.data.clone()) for box in boxes]
    dist.all_gather_object(said, mine)
    return assemble(
        SourceBox(name=name, global_shape=shape, start=start, data=data)
        for share in said
        for name, shape, start, data in share
    )


def gathered(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The same, by torch."""
    return {
        name: (tensor.full_tensor() if is_dtensor(tensor) else tensor).detach()
        for name, tensor in tensors.items()
    }


def difference(whole: Tensors, expected: Tensors) -> str | None:
    if whole.keys() != expected.keys():
        return f"names {sorted(whole)} instead of {sorted(expected)}"
    wrong = [name for name in expected if not torch.equal(whole[name], expected[name])]
    return f"{wrong} differ" if wrong else None


def compared(tensors: Tensors) -> str | None:
    """Compare boxes with what torch gathers, and hold them to the tensors' own memory."""
    boxes = hf_boxes(tensors)
    wrong = difference(together(boxes), gathered(tensors)) if tensors else together(boxes) and None
    own = {local(each).untyped_storage().data_ptr() for each in tensors.values()}
    copied = [box.name for box in boxes if box.data.untyped_storage().data_ptr() not in own]
    return wrong or (f"{copied} are copies" if copied else None)


def local(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tensor.to_local() if is_dtensor(tensor) else tensor


def sharded_by_fsdp(
    width: int, inner: int, *mesh: int, axis: int = 0, tensor_parallel: bool = False
) -> nn.Sequential | None:
    """A model under fully_shard, with the last mesh axis for tensor parallelism if asked."""
    names = ("replicate", "shard", *(["tp"] if tensor_parallel else []))[-len(mesh) :]
    places = mesh_of(*mesh, names=names)
    if places.get_coordinate() is None:
        return None
    model = model_of(width, inner)
    if tensor_parallel:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for layer in model:
            parallelize_module(layer, places["tp"], plan)
        places = places[names[:-1]]
    for layer in model:
        fully_shard(layer, mesh=places, shard_placement_fn=lambda each: Shard(axis % each.ndim))
    fully_shard(model, mesh=places)
    return model


def fsdp(*sizes: int, **how: Any) -> str | None:
    model = sharded_by_fsdp(*sizes, **how)
    return compared(dict(fsdp_tensors(model)) if model is not None else {})


def placed(shape: tuple[int, ...], mesh: tuple[int, ...], *placements: Placement) -> str | None:
    """A tensor cut by distribute_tensor."""
    torch.manual_seed(3)
    whole = torch.randn(shape)
    return compared({"w": distribute_tensor(whole, mesh_of(*mesh), placements)})


def replicas() -> str | None:
    """Equal boxes on the ranks of a replicated mesh axis, from which a plan reads evenly."""
    mesh = mesh_of(2, 2)
    tensor = distribute_tensor(torch.arange(12.0).view(6, 2), mesh, [Replicate(), Shard(0)])
    (box,) = hf_boxes({"w": tensor})
    said: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(said, (box.start, box.shape))
    expected = [((0, 0), (3, 2)), ((3, 0), (3, 2))] * 2
    return None if said == expected else f"{said} instead of {expected}"


def experts(mesh: tuple[int, ...], *placements: Placement, ffn: int = 5) -> str | None:
    """Fused experts [3, 2 x ffn, 8], whatever axis is cut; a share may have rows of both halves."""
    torch.manual_seed(5)
    prefix = "model.layers.0.mlp.experts"
    fused = {f"{prefix}.gate_up_proj": torch.randn(3, 2 * ffn, 8)}
    fused[f"{prefix}.down_proj"] = torch.randn(3, 8, ffn)
    places = mesh_of(*mesh)
    cut = {name: distribute_tensor(whole, places, placements) for name, whole in fused.items()}
    boxes = hf_boxes(cut)
    expected = assemble(hf_boxes(fused))
    return difference(together(boxes), expected)


def stepped() -> str | None:
    """The same boxes hold what a step has made; parameters that are replaced are followed."""
    model = sharded_by_fsdp(6, 7, 4)
    assert model is not None
    before, old = hf_boxes(fsdp_tensors(model)), gathered(dict(fsdp_tensors(model)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 6)).square().sum().backward()
    optimizer.step()
    new = gathered(dict(fsdp_tensors(model)))
    if difference(old, new) is None:
        return "the step changed nothing"
    wrong = difference(together(before), new)
    model.to(torch.float64)
    moved = dict(fsdp_tensors(model))
    return wrong or difference(together(hf_boxes(moved)), gathered(moved))


def offloaded() -> str | None:
    """Shares that lie on the CPU while they are not computed with, and then lie elsewhere."""
    model = model_of(6, 7)
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh_of(4), offload_policy=CPUOffloadPolicy(pin_memory=False))
    offer = HfOffer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 6)).square().sum().backward()
        optimizer.step()
        for each in model.parameters():  # offloaded and brought back: other storages
            held: Any = each.data
            each.data = DTensor.from_local(
                held.to_local().clone(),
                held.device_mesh,
                held.placements,
                shape=held.shape,
                stride=held.stride(),
            )
        wrong = difference(together(list(offer.boxes())), gathered(dict(fsdp_tensors(model))))
        if wrong:
            return wrong
    return None


def transformers_experts() -> str | None:
    """Renamed modules and fused experts of a model under fully_shard, as they would be saved."""
    family = family_named("mixtral")
    model, whole = (random_model(family, seed=0, dtype=torch.float32) for _ in range(2))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh_of(4))
    return difference(together(list(HfOffer(model).boxes())), assemble(HfOffer(whole).boxes()))


def unsharded() -> str | None:
    """A root module stays unsharded after a forward pass: it is resharded before the offer."""
    model = sharded_by_fsdp(6, 7, 4)
    assert model is not None
    expected = gathered(dict(fsdp_tensors(model)))
    for layer in (*model, model):
        assert isinstance(layer, FSDPModule)
        layer.unshard()
    if any(is_dtensor(each) for each in model.parameters()):
        return "nothing was unsharded"
    tensors = dict(fsdp_tensors(model))
    if not all(is_dtensor(tensors[name]) for name, _ in model.named_parameters()):
        return "whole parameters were offered"
    return difference(together(hf_boxes(tensors)), expected)


def refused(offer: Callable[[], object], *words: str) -> str | None:
    try:
        offer()
    except UnsupportedError as error:
        missing = [word for word in words if word not in str(error)]
        return f"{missing} not in: {error}" if missing else None
    return "it was taken"


def partial_sums() -> str | None:
    tensor = DTensor.from_local(torch.ones(2, 3), mesh_of(4), [Partial()])
    return refused(lambda: hf_boxes({"w": tensor}), "w: ", "P(sum)", "in place")


def not_cut_as_torch_does() -> str | None:
    """Such as rows that a user dealt out by hand: 1, 2, 3 and 4 of 10."""
    rows = dist.get_rank() + 1
    tensor = DTensor.from_local(
        torch.ones(rows, 2), mesh_of(4), [Shard(0)], shape=torch.Size((10, 2)), stride=(2, 1)
    )
    if rows == 3:  # it happens to have what torch would give it
        return None
    return refused(lambda: hf_boxes({"w": tensor}), "w: ", "(10, 2)", f"is ({rows}, 2)")


def fsdp1() -> str | None:
    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    words = ("FSDP1", "FullyShardedDataParallel")
    named = refused(lambda: hf_boxes(model.named_parameters()), *words)
    return named or refused(lambda: list(fsdp_tensors(model)), *words)


CASES: dict[str, Case] = {
    "fsdp_2_ranks_even": partial(fsdp, 4, 8, 2),
    "fsdp_2_ranks_uneven": partial(fsdp, 3, 7, 2),
    "fsdp_4_ranks_uneven": partial(fsdp, 6, 9, 4),
    "fsdp_4_ranks_some_empty": partial(fsdp, 2, 5, 4),
    "fsdp_on_axis_1": partial(fsdp, 4, 8, 4, axis=1),
    "hsdp": partial(fsdp, 3, 5, 2, 2),
    "fsdp_and_tp": partial(fsdp, 8, 12, 2, 2, tensor_parallel=True),
    "fsdp_and_tp_uneven": partial(fsdp, 5, 10, 2, 2, tensor_parallel=True),
    "fsdp_and_tp_some_empty": partial(fsdp, 1, 2, 2, 2, tensor_parallel=True),
    "hsdp_and_tp": partial(fsdp, 8, 6, 1, 2, 2, tensor_parallel=True),
    "tp_rows": partial(placed, (10, 3), (4,), Shard(0)),
    "tp_columns": partial(placed, (3, 9), (4,), Shard(1)),
    "replicated": partial(placed, (3, 2), (2, 2), Replicate(), Replicate()),
    "replicas": replicas,
    "two_axes": partial(placed, (5, 7), (2, 2), Shard(1), Shard(0)),
    "one_axis_twice": partial(placed, (11,), (2, 2), Shard(0), Shard(0)),
    "scalar": partial(placed, (), (4,), Replicate()),
    "no_elements": partial(placed, (0, 3), (4,), Shard(0)),
    "strided": partial(placed, (16, 3), (2, 2), Replicate(), _StridedShard(0, split_factor=2)),
    "strided_in_three": partial(placed, (12, 2), (4,), _StridedShard(0, split_factor=3)),
    "experts_by_expert": partial(experts, (4,), Shard(0)),
    "experts_by_row": partial(experts, (4,), Shard(1)),
    "experts_by_column": partial(experts, (4,), Shard(2)),
    "experts_by_expert_and_row": partial(experts, (2, 2), Shard(0), Shard(1)),
    "experts_strided": partial(experts, (4,), _StridedShard(1, split_factor=2), ffn=4),
    "stepped": stepped,
    "offloaded": offloaded,
    "transformers_experts": transformers_experts,
    "unsharded": unsharded,
    "partial_sums": partial_sums,
    "not_cut_as_torch_does": not_cut_as_torch_does,
    "fsdp1": fsdp1,
}


def run_rank(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=WORLD_SIZE
    )
    wrong = {name: case() for name, case in CASES.items()}
    (folder / f"{rank}.json").write_text(json.dumps(wrong))
    dist.destroy_process_group()


def main() -> None:
    """End with 1 as soon as a rank fails: the others would wait for it."""
    forks = multiprocessing.get_context("fork")
    ranks = [
        forks.Process(target=run_rank, args=(rank, Path(sys.argv[1])), daemon=True)
        for rank in range(WORLD_SIZE)
    ]
    for rank in ranks:
        rank.start()
    left = {rank.sentinel for rank in ranks}
    while left and not any(rank.exitcode for rank in ranks):
        left -= set(wait(list(left)))
    sys.exit(any(rank.exitcode for rank in ranks))


if __name__ == "__main__":
    main()
