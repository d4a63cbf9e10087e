"""Which of an operation's two implementations a device gets."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

__all__ = ["implementation"]


def implementation(operation: str, device: torch.device) -> ModuleType:
    """`triton_kernel` of the operation's package on a GPU, else `reference`.

    Triton is imported when a GPU first needs it, so a CPU needs none.
    """
    name = "triton_kernel" if device.type == "cuda" else "reference"
    return import_module(f"{operation}.{name}")
