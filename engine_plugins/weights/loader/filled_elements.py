"""How many elements of some tensors a loader fills, counted while it does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from engine_plugins.weights.loader.loader_mode import COPY, FILLS, LoaderMode, storage_id

__all__ = ["FilledElements"]


class FilledElements(LoaderMode):
    """A context in which copies into tensors and fills of them are counted, with their elements."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._watched = list(tensors)
        self._numel = {storage_id(tensor): 0 for tensor in self._watched}

    def of(self, tensor: torch.Tensor) -> int | None:
        """Elements that were filled: more than there are if some were twice; None if unwatched."""
        return self._numel.get(storage_id(tensor))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is COPY or func in FILLS:
            storage = storage_id(args[0])
            if storage in self._numel:
                self._numel[storage] += args[0].numel()
        return func(*args, **(kwargs or {}))
