"""The block-FP8 form of a Hugging Face checkpoint: which tensors it quantizes, and how.

A matrix `X.weight` [rows, columns] becomes float8_e4m3fn of the same shape and `X.weight_scale_inv`
float32 [ceil(rows / 128), ceil(columns / 128)], what each block of 128 x 128 is multiplied with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from engine_plugins.errors import UnsupportedError

__all__ = ["BLOCK", "SCALE_SUFFIX", "BlockFp8"]

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"

_KEPT_LEAVES = frozenset(
    {"eh_proj", "embed_tokens", "gate", "head", "lm_head", "shared_expert_gate"}
)
"""Modules of matrices that no such checkpoint quantizes: embeddings, heads, routers."""


@dataclass(frozen=True, kw_only=True)
class BlockFp8:
    """Which tensors are quantized.

    Attributes:
        kept: modules that stay as they are, each with all that is below it, by their path or by
            the end of it (`model.layers.0.mlp.down_proj`, `visual`).
        also: modules that are quantized although their kind usually is not (`lm_head`).
        ue8m0: whether scales are powers of two.
        others: dtype of floating tensors beside the quantized ones, but for routers' correction
            biases; None sends them as `send_dtype` says.
    """

    kept: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    ue8m0: bool = False
    others: torch.dtype | None = None

    @classmethod
    def of_config(cls, config: object) -> Self:
        """Read the form from a HF config's `quantization_config`; without one, the usual form.

        Args:
            config: the HF config, object or dict, or None.

        Raises:
            UnsupportedError: another method, block size or activation scheme.
        """
        told = _get(config, "quantization_config")
        if told is None:
            return cls()
        wanted: dict[str, tuple[object, ...]] = {
            "quant_method": ("fp8",),
            "weight_block_size": ([BLOCK, BLOCK], (BLOCK, BLOCK)),
            "activation_scheme": ("dynamic", None),
            "fmt": ("e4m3", None),
            "scale_fmt": ("ue8m0", "float", None),
        }
        for key, known in wanted.items():
            if _get(told, key) not in known:
                raise UnsupportedError(
                    f"the config's quantization_config has {key} {_get(told, key)!r}; weights can "
                    f"be quantized for {known[0]!r}",
                    remedy="give the config of a checkpoint in FP8 blocks of 128 x 128 (e4m3)",
                )
        kept: Sequence[str] = [
            name
            for key in ("modules_to_not_convert", "ignored_layers")
            for name in _get(told, key) or ()
        ]
        return cls(kept=tuple(dict.fromkeys(kept)), ue8m0=_get(told, "scale_fmt") == "ue8m0")

    def quantizes(self, name: str, shape: Sequence[int]) -> bool:
        """Say whether a tensor of this HF name and whole shape is quantized."""
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(shape) != 2 or _among(module, self.kept):
            return False
        return module.rpartition(".")[2] not in _KEPT_LEAVES or _among(module, self.also)


def _among(module: str, named: Sequence[str]) -> bool:
    """Whether a module, or one above it, is named by its path or by the end of it."""
    return any(f".{name}." in f".{module}." for name in named)


def _get(config: object, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    return getattr(config, name, None)
