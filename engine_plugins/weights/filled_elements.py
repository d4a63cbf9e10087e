"""How many elements of some tensors a loader fills, counted while it does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FilledElements"]

_WRITES = (
    torch.ops.aten.copy_.default,
    torch.ops.aten.fill_.Scalar,
    torch.ops.aten.fill_.Tensor,
    torch.ops.aten.zero_.default,
)


class FilledElements(TorchDispatchMode):
    """A context in which copies into tensors and fills of them are counted, with their elements."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched = list(tensors)
        self._numel = {_storage_id(tensor): 0 for tensor in self._watched}

    def of(self, tensor: torch.Tensor) -> int | None:
        """Elements that were filled: more than there are if some were twice; None if unwatched."""
        return self._numel.get(_storage_id(tensor))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in a loader, and torch's guard against it is slow."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _WRITES:
            storage = _storage_id(args[0])
            if storage in self._numel:
                self._numel[storage] += args[0].numel()
        return func(*args, **(kwargs or {}))


def _storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
