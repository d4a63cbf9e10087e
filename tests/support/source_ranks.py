"""Trainer ranks within this process: real memory, real manifests, the in-memory wire."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.in_memory import InMemoryTransport

__all__ = ["SourceRank", "offered_boxes", "offered_tensors", "random_bits", "tensor_of", "whole"]

_serial = itertools.count()


@dataclass(frozen=True, kw_only=True)
class SourceRank:
    """One trainer process: its wire and what it offers."""

    transport: InMemoryTransport
    source: WeightSource

    @property
    def manifest(self) -> SourceManifest:
        return self.source.manifest

    def hold(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Have the memory that it offers hold other weights, in place, as training does."""
        for box in self.source._describe():
            box.data.copy_(tensors[box.name])


@contextmanager
def offered_boxes(
    *ranks: Sequence[SourceBox], model: Mapping[str, str | int | bool] | None = None
) -> Iterator[list[SourceRank]]:
    """Offer each rank's boxes under an agent of its own; agents are numbered as the ranks are."""
    with ExitStack() as stack:
        made = []
        for global_rank, boxes in enumerate(ranks):
            transport = InMemoryTransport(f"trainer-{global_rank}.{next(_serial)}")
            stack.callback(transport.close)
            source = WeightSource(
                list(boxes), transport, source=f"trainer rank {global_rank}", model=model
            )
            stack.callback(source.close)
            made.append(SourceRank(transport=transport, source=source))
        yield made


@contextmanager
def offered_tensors(
    tensors: Mapping[str, torch.Tensor], *, model: Mapping[str, str | int | bool] | None = None
) -> Iterator[SourceRank]:
    """Offer whole tensors from one trainer process."""
    with offered_boxes(hf_boxes(tensors), model=model) as (rank,):
        yield rank


def whole(name: str, data: torch.Tensor) -> SourceBox:
    """A tensor as one box."""
    return SourceBox(name=name, global_shape=tuple(data.shape), start=(0,) * data.ndim, data=data)


def tensor_of(name: str, data: torch.Tensor) -> LogicalTensor:
    """What a plan is told of a tensor."""
    return LogicalTensor(name=name, shape=tuple(data.shape), dtype=data.dtype)


def random_bits(shape: Sequence[int], dtype: torch.dtype, *, seed: int) -> torch.Tensor:
    """Any bit pattern that the dtype has, NaNs included: compare with `same_bits`."""
    generator = torch.Generator().manual_seed(seed)
    numel = int(torch.Size(shape).numel())
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(tuple(shape))
