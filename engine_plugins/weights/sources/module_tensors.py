"""A model's parameters and saved buffers, looked at anew each time at little cost.

To walk 20,000 modules and put their names together takes a tenth of a second. Whether the tree is
the one of the last walk is seen in a few milliseconds, from the dictionaries that it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import nn

__all__ = ["ModuleTensors"]


class ModuleTensors:
    """What a function finds in a model, found again only when the model has other parts.

    Args:
        model: of any modules; those of FSDP2 are resharded at every look.
        walk: gives the named tensors of the model.
    """

    def __init__(
        self, model: nn.Module, walk: Callable[[nn.Module], Iterable[tuple[str, torch.Tensor]]]
    ) -> None:
        self._model = model
        self._walk = walk
        self._tree: _Tree | None = None
        self._found: list[tuple[str, torch.Tensor]] = []

    def __call__(self) -> Sequence[tuple[str, torch.Tensor]]:
        """The named tensors as they are now."""
        if self._tree is not None:
            self._tree.reshard()
            if self._tree.same():
                return self._found
        self.forget()
        self._found = list(self._walk(self._model))
        self._tree = _Tree(self._model)
        return self._found

    def forget(self) -> None:
        """Hold on to no tensor."""
        self._tree, self._found = None, []


class _Tree:
    """The modules under one, and the dictionaries that hold their children and tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._sharded = [module for module in self._modules if isinstance(module, _fsdp_module())]
        self._holders = self._holders_now()
        self._lengths = list(map(len, self._holders))
        entries = [(held, key, value) for held in self._holders for key, value in held.items()]
        self._of = [held for held, _, _ in entries]
        self._keys = [key for _, key, _ in entries]
        self._values = [value for _, _, value in entries]
        self._buffered = [module for module in self._modules if module._buffers]
        self._unsaved = [set(module._non_persistent_buffers_set) for module in self._buffered]

    def reshard(self) -> None:
        """Have FSDP2 put its sharded parameters back: those are what the optimizer steps."""
        for module in self._sharded:
            module.reshard()

    def same(self) -> bool:
        """Whether every module holds what it held."""
        holders = self._holders_now()
        return (
            all(map(is_, holders, self._holders))
            and list(map(len, holders)) == self._lengths
            and all(map(is_, map(dict.get, self._of, self._keys), self._values))
            and [module._non_persistent_buffers_set for module in self._buffered] == self._unsaved
        )

    def _holders_now(self) -> list[dict[str, Any]]:
        return [
            *(module._modules for module in self._modules),
            *(module._parameters for module in self._modules),
            *(module._buffers for module in self._modules),
        ]


def _fsdp_module() -> type[Any]:
    from torch.distributed.fsdp import FSDPModule

    return FSDPModule
