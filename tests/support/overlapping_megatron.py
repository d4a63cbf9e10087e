"""Stand-ins for Megatron's DDP wrapper, whose parameters are gathered in the next forward pass.

Like megatron-core 0.16.1: `start_param_sync(force_sync=True)` gathers, hooks of the modules inside
do it otherwise, and an optimizer step leaves only a slice new.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

__all__ = ["DistributedDataParallel"]


class DistributedDataParallel(nn.Module):
    """Holds back the second half of every parameter's new values until it is told to gather."""

    def __init__(self, module: nn.Module, **options: object) -> None:
        super().__init__()
        self.module = module
        self.ddp_config = SimpleNamespace(**{"overlap_param_gather": True} | options)
        self.gathers: list[dict[str, bool]] = []
        self._new: dict[nn.Parameter, torch.Tensor] = {}
        for part in module.modules():
            part.register_forward_pre_hook(self._make_forward_pre_hook())

    def _make_forward_pre_hook(self) -> Any:
        def hook(module: nn.Module, *unused: object) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.data.copy_(self._new.pop(parameter, parameter.data))

        return hook

    def step(self) -> None:
        """Double every value, and keep half of the new ones back."""
        for parameter in self.module.parameters():
            self._new[parameter] = 2 * parameter.data
            half = parameter.data.view(-1)[: parameter.numel() // 2]
            half.mul_(2)

    def start_param_sync(self, *unused: object, force_sync: bool = False) -> None:
        """Gather, if it is forced; otherwise the hooks will."""
        self.gathers.append({"force_sync": force_sync})
        if force_sync:
            for parameter, new in self._new.items():
                parameter.data.copy_(new)
            self._new.clear()
