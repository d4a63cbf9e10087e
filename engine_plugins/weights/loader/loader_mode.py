"""What watches a loader at work has in common: torch tells it every operation."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["COPY", "FILLS", "LoaderMode", "storage_id"]

COPY = torch.ops.aten.copy_.default
FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)


class LoaderMode(TorchDispatchMode):
    """A context in which a loader runs; what it does reaches `__torch_dispatch__`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in a loader, and torch's guard against it is slow."""
        return False


def storage_id(tensor: torch.Tensor) -> int:
    """Which memory a tensor is a view of; another's once nobody holds that memory."""
    return int(tensor.untyped_storage()._cdata)
