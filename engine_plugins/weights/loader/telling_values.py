"""Whether values tell one layout from another, and values that do.

That a live parameter holds just what was copied shows its layout only if another layout would hold
something else. Constants, repeated rows and symmetric matrices look the same in many layouts; so
do a few parts of a parameter that are equal to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["pattern_like", "tell_places_apart"]

_CORNER = 16
_VECTOR = 128
_DISTINCT = 8
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PERIOD = 1_048_573
"""A prime: no packing, in powers of two, moves values by a multiple of it."""

Bits = npt.NDArray[np.integer[Any]]


def tell_places_apart(parts: Sequence[torch.Tensor]) -> bool:
    """Whether the parts of one parameter are such that no other layout would look the same.

    A corner of each part is looked at: engines pack a parameter in one way all over.
    """
    corners = [_corner(part) for part in parts]
    different = {(corner.shape, corner.tobytes()) for corner in corners}
    return len(different) == len(parts) and all(map(_is_telling, corners))


def pattern_like(tensor: torch.Tensor, *, seed: int) -> torch.Tensor:
    """A tensor on the CPU, of the same shape and dtype, whose values tell places apart.

    It repeats after about a million elements.
    """
    values = _random(tensor.dtype)
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    flat = made.view(-1)
    first = seed * 7919 % _PERIOD
    done = 0
    while done < len(flat):
        here = min(len(flat) - done, _PERIOD - first)
        flat[done : done + here] = values[first : first + here]
        done, first = done + here, 0
    return made


@lru_cache(maxsize=4)
def _random(dtype: torch.dtype) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(_PERIOD, generator=random).to(dtype)
    return torch.randint(-128 if dtype.is_signed else 0, 127, (_PERIOD,), generator=random).to(
        dtype
    )


def _corner(part: torch.Tensor) -> Bits:
    """The bits of up to 16 x 16 elements, or of 128 of a vector."""
    part = part.detach().squeeze()
    if part.ndim < 2:
        part = part.reshape(-1)[:_VECTOR]
    else:
        part = part[(0,) * (part.ndim - 2)][:_CORNER, :_CORNER]
    return part.contiguous().view(_BITS[part.element_size()]).cpu().numpy()


def _is_telling(bits: Bits) -> bool:
    if bits.size < 2:
        return True
    if len(np.unique(bits)) < min(_DISTINCT, bits.size):
        return False
    if bits.ndim == 1:
        return all((bits[k:] != bits[:-k]).any() for k in range(1, len(bits) // 2 + 1))
    every = all(len({row.tobytes() for row in lines}) == len(lines) for lines in (bits, bits.T))
    return every and not np.array_equal(bits, bits.T)
