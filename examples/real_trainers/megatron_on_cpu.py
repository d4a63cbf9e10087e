"""Lets Megatron-Core train on a CPU: a GPU is where it needs none of this.

It asks CUDA for a device, streams, random numbers and a mask, whatever the model is on, and its
distributed optimizer knows parameters on a GPU alone, by the names of their types.
"""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["OnCpu", "patch_for_cpu"]


class OnCpu(TorchFunctionMode):
    """Makes on the CPU what Megatron makes on a GPU without asking."""

    def __torch_function__(
        self, function: Any, kinds: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        """Call the function, with another device where it names CUDA."""
        given = dict(options or {})
        if str(given.get("device")).startswith("cuda"):
            given["device"] = "cpu"
        result = function(*arguments, **given)
        # The distributed optimizer takes parameters of these types alone, by name.
        names = function is torch.Tensor.type and isinstance(result, str)
        return result.replace("torch.", "torch.cuda.") if names else result


def patch_for_cpu() -> None:
    """Patch what is asked of CUDA; before Megatron is imported."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    warnings.filterwarnings("ignore")
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel import random

    def set_to(owner: Any, name: str, value: object) -> None:
        setattr(owner, name, value)

    set_to(torch.cuda, "current_device", lambda: torch.device("cpu"))
    set_to(torch.Tensor, "cuda", lambda self, *_, **__: self)
    set_to(random.CudaRNGStatesTracker, "fork", lambda *_, **__: nullcontext())
    set_to(
        fused_softmax, "get_default_causal_mask", lambda size: torch.ones(size, size).triu(1) > 0
    )
