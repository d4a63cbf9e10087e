"""Element types by the names that travel: the only types a manifest may speak of.

A table and not `getattr(torch, name)`, because the names come from peers.
"""

from __future__ import annotations

import torch

from engine_plugins.errors import ManifestError, SourceError

__all__ = ["DTYPES", "dtype_name", "dtype_named"]

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    )
}
"""Name without the module (`bfloat16`) -> torch dtype; all have whole bytes per element."""


def dtype_named(name: str) -> torch.dtype:
    """Look a dtype up by its manifest name.

    Raises:
        ManifestError: the name is not one of `DTYPES`.
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise ManifestError(
            f"unknown dtype {name[:64]!r}", remedy=f"use one of {', '.join(DTYPES)}"
        ) from None


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as manifests do.

    Raises:
        SourceError: tensors of this dtype cannot be offered (complex, quantized, sub-byte).
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise SourceError(
            f"tensors of dtype {name} cannot be offered",
            remedy=f"convert to one of {', '.join(DTYPES)}",
        )
    return name
