"""A whole tensor, of which everybody speaks by its HF name."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

__all__ = ["LogicalTensor"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LogicalTensor:
    """A whole tensor under its HF checkpoint name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor, in bytes."""
        return prod(self.shape) * self.dtype.itemsize
