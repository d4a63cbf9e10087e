"""A server without an accelerator whose LoRA may ask for pinned memory, as SGLang's always does.

Only a driver pins memory. Here what is to be pinned stays as it is: nothing else is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tests.support.sglang_launcher import launch


def _unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return make(*args, **kwargs)

    return made


for name in ("tensor", "empty", "zeros"):
    setattr(torch, name, _unpinned(getattr(torch, name)))
torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]

if __name__ == "__main__":
    launch()
