"""Kernels that write into the caller's buffers: block FP8, strided copies, a digest.

Each operation is a folder: `reference.py` in plain torch says what is computed, `triton_kernel.py`
computes the same bits on a GPU, and one public function picks by the device of its tensors. On the
CPU triton is not imported. Nothing here knows an engine or `engine_plugins`.
"""

from engine_kernels.block_dequantize import dequantize_blocks
from engine_kernels.block_format import BlockFormat, ScaleLayout
from engine_kernels.block_quantize import quantize_blocks
from engine_kernels.buffers import BufferMismatchError
from engine_kernels.digest import add_digest
from engine_kernels.strided_copy import gather_strided, scatter_strided
from engine_kernels.strided_copy.box_table import BoxTable, StridedBox

__all__ = [
    "BlockFormat",
    "BoxTable",
    "BufferMismatchError",
    "ScaleLayout",
    "StridedBox",
    "add_digest",
    "dequantize_blocks",
    "gather_strided",
    "quantize_blocks",
    "scatter_strided",
]
