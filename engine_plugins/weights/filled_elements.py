"""How many elements of some tensors a loader fills, counted while it does."""

from __future__ import annotations

from collections.abc import Mapping
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
    """A context in which copies into tensors and fills of them are counted, with their elements.

    Attributes:
        numel: elements by tensor's name; more than the tensor has where some are filled twice.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = dict.fromkeys(tensors, 0)
        self._names: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            self._names.setdefault(_storage_id(tensor), []).append(name)

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
            for name in self._names.get(_storage_id(args[0]), ()):
                self.numel[name] += args[0].numel()
        return func(*args, **(kwargs or {}))


def _storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
