"""Matrices to quantize, joined into as few calls as their memory allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch

from engine_kernels import BlockFormat, quantize_blocks

__all__ = ["Job", "Quantize", "block_quantizer", "joined"]


class Quantize(Protocol):
    """Quantizes a matrix, or several of one shape, in blocks of 128 x 128."""

    def __call__(
        self, weights: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, /
    ) -> None:
        """Fill `values` (float8_e4m3fn) and `scales` (float32) from [rows, columns] or [n, ...]."""
        ...


class Job(NamedTuple):
    """One call of `Quantize`."""

    weights: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor


def block_quantizer(*, powers_of_two: bool) -> Quantize:
    """Take `quantize_blocks` of the kernels package: on a GPU its kernel, on the CPU plain torch.

    Args:
        powers_of_two: what scales are rounded up to.
    """
    block_format = BlockFormat(powers_of_two=powers_of_two)

    def quantize(weights: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, /) -> None:
        quantize_blocks(weights, values, scales, block_format)

    return quantize


def joined(jobs: Iterable[Job]) -> Iterator[Job]:
    """Join neighbours whose memory lies at equal steps: all experts of a layer are one call."""
    group: list[Job] = []
    for job in jobs:
        if group and not _continues(group, job):
            yield _stacked(group)
            group = []
        group.append(job)
    if group:
        yield _stacked(group)


def _continues(group: list[Job], job: Job) -> bool:
    steps = _steps(group[-1], job)
    if steps is None:
        return False
    return len(group) == 1 or steps == _steps(group[-2], group[-1])


def _steps(one: Job, other: Job) -> list[int] | None:
    """Elements from each tensor of a job to that of the next; None where they do not fit."""
    steps: list[int] = []
    for mine, theirs in zip(one, other, strict=True):
        same = (mine.shape, mine.stride(), mine.dtype) == (
            theirs.shape,
            theirs.stride(),
            theirs.dtype,
        )
        step = int(theirs.storage_offset() - mine.storage_offset())
        storages = (each.untyped_storage().data_ptr() for each in (mine, theirs))
        if not same or len(set(storages)) > 1 or step < mine.stride(0) * len(mine):
            return None
        steps.append(step)
    return steps


def _stacked(group: list[Job]) -> Job:
    steps = next((_steps(*pair) for pair in pairwise(group)), None)
    if steps is None:
        return group[0]
    return Job(
        *(
            each.as_strided((len(group), *each.shape), (step, *each.stride()))
            for each, step in zip(group[0], steps, strict=True)
        )
    )
