"""vLLM on a CPU with AMX, as far as loading a model goes, wherever the tests run.

Without AMX vLLM is told that there is some, and its packing gets a stand-in that refuses what the
real one refuses (`convert_weight_packed` of its `csrc/cpu/sgl-kernels/gemm.cpp`: tiles of 16 rows
by 32 columns, bfloat16) and packs nothing. That shows which way vLLM goes and which sizes it
takes, not what its kernels compute. With AMX nothing is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

__all__ = ["TILE_COLUMNS", "TILE_ROWS", "amx_for_vllm"]

TILE_ROWS, TILE_COLUMNS = 16, 32
PACKED = (torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn, torch.uint8)


@contextmanager
def amx_for_vllm() -> Iterator[bool]:
    """Have vLLM take its AMX paths; whether these are the real ones.

    vLLM must have loaded its operators before, by which it has chosen its library.
    """
    real = torch.cpu._is_amx_tile_supported()
    with pytest.MonkeyPatch.context() as patch:
        if not real:
            patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
            patch.setattr(torch.ops._C, "convert_weight_packed", _packed, raising=False)
        yield real


def _packed(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape[-2:]
    if rows % TILE_ROWS:
        raise RuntimeError(f"invalid weight out features {rows}")
    if columns % TILE_COLUMNS:
        raise RuntimeError(f"invalid weight input features {columns}")
    if weight.dtype not in PACKED:
        raise RuntimeError("expect weight to be bfloat16, float16, int8, fp8_e4m3 or uint8")
    return weight.clone()
