"""The memory behind tensors, of which views and tied parameters share much."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["storages"]


def storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """The storages of tensors, each address once, in the order of their sizes; none is empty."""
    found = sorted((tensor.untyped_storage() for tensor in tensors), key=len)
    return [each for each in {each.data_ptr(): each for each in found}.values() if len(each)]
