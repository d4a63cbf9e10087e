"""Which of an engine's tensors a view lies in: storages are known, and places in them.

Several parameters may be parts of one storage (packed experts), and one may have two names.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine_plugins.weights.loader.loader_mode import storage_id

__all__ = ["WatchedMemory"]


class _Extent(NamedTuple):
    """The bytes of a storage from a tensor's first element to its last."""

    start: int
    end: int
    name: str
    is_parameter: bool


class WatchedMemory:
    """Tensors by where they lie; they have to be kept alive, or an identity could be used again."""

    def __init__(self) -> None:
        self._extents: dict[int, list[_Extent]] = {}

    def add(self, name: str, tensor: torch.Tensor, *, is_parameter: bool) -> None:
        """Know a tensor under a name; the last one of equal place gives its name."""
        extent = _Extent(*_reach(tensor), name, is_parameter)
        self._extents.setdefault(storage_id(tensor), []).append(extent)

    def knows_storage_of(self, tensor: torch.Tensor) -> bool:
        """Whether any tensor that was added lies in the same storage."""
        return storage_id(tensor) in self._extents

    def name_of(self, view: torch.Tensor) -> str | None:
        """The smallest tensor that holds a view whole, a parameter before any other.

        Of a view that none holds whole, the one in which it begins. None where no tensor that was
        added lies in its storage.
        """
        here = self._extents.get(storage_id(view))
        if here is None or len(here) == 1:  # nearly always
            return None if here is None else here[0].name
        start, end = _reach(view)
        around = [each for each in here if each.start <= start and end <= each.end]
        if around:
            return min(reversed(around), key=_narrowness).name
        begun = [each for each in here if each.start <= start < each.end]
        return min(begun or here, key=_narrowness).name


def _narrowness(extent: _Extent) -> tuple[bool, int]:
    return not extent.is_parameter, extent.end - extent.start


def _reach(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage in which a tensor begins and before which it ends."""
    item = tensor.element_size()
    start = int(tensor.storage_offset()) * item
    if not tensor.numel():
        return start, start
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return start, start + (int(last) + 1) * item
