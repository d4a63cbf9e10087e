"""A view of a whole tensor as a region of it, so that it can be cut out of any share of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

__all__ = ["View", "view_of"]


@dataclass(frozen=True, kw_only=True)
class View:
    """A region of a tensor, its axes in any order; of axes that it lacks one index.

    Attributes:
        start: first index of the region on each of the tensor's axes.
        extents: of the region, on each of the tensor's axes.
        axes: for each axis of the view, the tensor's axis that it runs along; None where it is
            of extent 1 and runs along none. None instead of a tuple: the view splits or joins
            axes, and can be had of whole tensors only.
        offset: of the first element, counted in the whole tensor without gaps.
        shape: of the view.
        strides: of the view, in elements of the whole tensor without gaps.
        whole: shape of the whole tensor.
    """

    start: tuple[int, ...]
    extents: tuple[int, ...]
    axes: tuple[int | None, ...] | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    whole: tuple[int, ...]

    def cut(
        self, start: Sequence[int], data: torch.Tensor
    ) -> tuple[tuple[int, ...], torch.Tensor] | None:
        """Cut what a share of the tensor holds of the view, without a copy.

        Args:
            start: first index of the share in the whole tensor.
            data: the share; any strides.

        Returns:
            First index of the cut in the view, and its elements; None if the share holds none.

        Raises:
            ValueError: a view that splits or joins axes, of a share that is not the whole tensor
                without gaps.
        """
        if self.axes is None:
            if tuple(data.shape) != self.whole or not data.is_contiguous():
                raise ValueError("the view splits or joins axes that are not whole here")
            first = data.storage_offset() + self.offset
            return (0,) * len(self.shape), data.as_strided(self.shape, self.strides, first)
        cuts: list[slice] = []
        firsts: list[int] = []
        for own, begin, extent, size in zip(
            self.start, start, self.extents, data.shape, strict=True
        ):
            low, high = max(own, begin), min(own + extent, begin + size)
            if low >= high:
                return None
            cuts.append(slice(low - begin, high - begin))
            firsts.append(low - own)
        region = data[tuple(cuts)]
        kept = [axis for axis in self.axes if axis is not None]
        for axis in reversed(range(region.ndim)):
            if axis not in kept:
                region = region.select(axis, 0)
        order = sorted(kept)
        region = region.permute([order.index(axis) for axis in kept])
        for position, along in enumerate(self.axes):
            if along is None:
                region = region.unsqueeze(position)
        return tuple(0 if axis is None else firsts[axis] for axis in self.axes), region


def view_of(view: torch.Tensor, shape: Sequence[int]) -> View:
    """Describe a view of a tensor of this shape that has no gaps; both may be placeholders."""
    strides = _strides(shape)
    offset = int(view.storage_offset())
    start = _unravel(offset, shape, strides)
    axes: list[int | None] = []
    extents = [1] * len(shape)
    whole = True
    for extent, stride in zip(view.shape, view.stride(), strict=True):
        axis = None if extent == 1 else _axis(extent, stride, shape, strides, start)
        if axis is None and extent != 1:
            whole = False
            break
        axes.append(axis)
        if axis is not None:
            extents[axis] = extent
    kept = [axis for axis in axes if axis is not None]
    return View(
        start=start,
        extents=tuple(extents),
        axes=tuple(axes) if whole and len(kept) == len(set(kept)) else None,
        offset=offset,
        shape=tuple(view.shape),
        strides=tuple(view.stride()),
        whole=tuple(shape),
    )


def _axis(
    extent: int, stride: int, shape: Sequence[int], strides: Sequence[int], start: Sequence[int]
) -> int | None:
    """The axis along which a view of such a stride runs."""
    for axis, size in enumerate(shape):
        if size > 1 and strides[axis] == stride and start[axis] + extent <= size:
            return axis
    return None


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _unravel(offset: int, shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    return tuple(
        offset // stride % size if size and stride else 0
        for size, stride in zip(shape, strides, strict=True)
    )
