"""A trainer's host without triton can quantize and digest on the CPU."""

from __future__ import annotations

import subprocess
import sys

from tests.support.engine_server import ROOT

PROGRAM = """
import sys
sys.modules["triton"] = None  # an import of it fails from here on
sys.path.insert(0, "kernels")
import torch
from engine_kernels import BlockFormat, add_digest, dequantize_blocks, quantize_blocks

weights = torch.randn(130, 200, generator=torch.Generator().manual_seed(0))
values = torch.empty(130, 200, dtype=torch.float8_e4m3fn)
scales = torch.empty(2, 2)
quantize_blocks(weights, values, scales, BlockFormat())
back = torch.empty_like(weights)
dequantize_blocks(values, scales, back, BlockFormat())
allowed = torch.maximum(weights.abs() / 16, scales.max() / 1024) * (1 + 2**-18)
assert ((back - weights).abs() <= allowed).all()
digest = torch.zeros(1, dtype=torch.int64)
add_digest(weights, digest)
assert int(digest)
"""


def test_triton_is_not_needed_on_the_cpu() -> None:
    """In a process of its own: this one has it loaded."""
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, check=True)
