"""What this machine's CPU can do, by which engines choose their kernels.

Nothing here is assumed of a machine: the header of every test run prints it, and a test that
depends on it asks PyTorch, as the engines do.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["FLAGS", "cpu_line", "serves_fp8_kv"]

FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
)
"""As Linux names them. vLLM has a library for each of avx2, avx512f and avx512_bf16."""


def cpu_line(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """One line: the model, the cores that this process may use, and which flags it has."""
    said = _first_cpu(cpuinfo)
    flags = set(said.get("flags", "").split())
    has = " ".join(flag for flag in FLAGS if flag in flags) or "none"
    lacks = " ".join(flag for flag in FLAGS if flag not in flags) or "none"
    cores = len(os.sched_getaffinity(0))
    return (
        f"{said.get('model name', 'of an unknown kind')}, {cores} cores; has {has}; lacks {lacks}"
    )


def serves_fp8_kv() -> bool:
    """Whether vLLM serves an FP8 KV cache here, by the same questions that it asks."""
    import torch

    return bool(torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported())


def _first_cpu(cpuinfo: Path) -> dict[str, str]:
    try:
        first = cpuinfo.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    lines = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
