"""Lets Megatron-Core build its Transformer Engine layers where Transformer Engine cannot run.

Its package has no CPU build, and Megatron-Bridge imports it. What is here holds parameters of the
names and shapes that Megatron's own wrappers (`TELinear`, `TENorm`, ...) expect of their bases,
which is what a dense model's weights are made of; nothing here computes.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["install"]

RELEASE = "2.10.0"
"""What Megatron takes it for: it asks before it uses what a release has."""


class _Unused(nn.Module):
    """A name that is imported, subclassed or instantiated, and never called."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


class Linear(nn.Module):
    """Holds this rank's `weight`, and `bias` where there is one."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        parallel_mode: str | None = None,
        tp_size: int = 1,
        params_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        self.use_bias = bias
        self.weight = nn.Parameter(torch.zeros(rows, columns, dtype=params_dtype))
        self.bias = nn.Parameter(torch.zeros(rows, dtype=params_dtype)) if bias else None


class LayerNormLinear(Linear):
    """Holds the norm in front of it as well."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        dtype = options.get("params_dtype")
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=dtype))


class RMSNorm(nn.Module):
    """Holds `weight`."""

    def __init__(
        self, hidden_size: int, *, params_dtype: torch.dtype | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=params_dtype))


MODULES = {
    "": "",
    "common": "",
    "common.recipe": "DelayedScaling",
    "pytorch": "DotProductAttention Fp8Padding Fp8Unpadding GroupedLinear LayerNorm",
    "pytorch.distributed": "CudaRNGStatesTracker activation_recompute_forward",
    "pytorch.float8_tensor": "Float8Tensor",
    "pytorch.fp8": "FP8GlobalStateManager fp8_autocast",
    "pytorch.ops": "FusibleOperation Sequential",
    "pytorch.router": "fused_compute_score_for_moe_aux_loss fused_moe_aux_loss "
    "fused_topk_with_score_function",
    "pytorch.tensor": "QuantizedTensor",
}
"""Modules below `transformer_engine`, parents first, and what is imported from them."""


def install() -> None:
    """Put the stand-in where `import transformer_engine` finds it."""
    for path, names in MODULES.items():
        name = f"transformer_engine.{path}".rstrip(".")
        module = ModuleType(name)
        module.__path__ = []
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        for unused in names.split():
            setattr(module, unused, type(unused, (_Unused,), {}))
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    for held in (Linear, LayerNormLinear, RMSNorm):
        setattr(sys.modules["transformer_engine.pytorch"], held.__name__, held)
    sys.modules["transformer_engine"].__dict__["__version__"] = RELEASE
