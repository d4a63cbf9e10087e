"""Block FP8: which elements share a scale, what a scale may be, and how scales lie in memory."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine_kernels.buffers import (
    BufferMismatchError,
    require_address,
    require_aligned_matrices,
    require_device,
    require_dtype,
    require_matrices,
    require_rows,
    require_shape,
)

__all__ = ["BLOCK", "E4M3_MAX", "SMALLEST_AMAX", "BlockFormat", "ScaleLayout", "as_experts"]

BLOCK = 128
"""Columns that share a scale, always; rows that do so in a format for weights."""
E4M3_MAX = 448.0
"""The largest finite e4m3 (the "fn" kind: no infinity, one NaN for each sign)."""
SMALLEST_AMAX = 1e-4
"""A block's largest magnitude counts as at least this, as in DeepGEMM: no scale is 0."""
TMA_BYTES = 16
"""What DeepGEMM's tensor memory accelerator wants addresses and pitches to be multiples of."""
VALUE_TYPES = (torch.float8_e4m3fn,)
WIDE_TYPES = (torch.bfloat16, torch.float32)


class ScaleLayout(enum.Enum):
    """How the scales of a matrix [rows, columns] lie in memory."""

    ROW_MAJOR = "row_major"
    """float32 [row blocks, column blocks], contiguous: `weight_scale_inv` of HF checkpoints."""
    COLUMN_MAJOR = "column_major"
    """The same shape with the rows next to each other, columns a multiple of 16 bytes apart.

    DeepGEMM's `get_mn_major_tma_aligned_tensor`, which SGLang and vLLM feed it with on sm_90.
    """
    PACKED_UE8M0 = "packed_ue8m0"
    """int32 [rows, column blocks / 4]: four exponents in a word, one word for every row.

    The lowest byte belongs to the first of the four column blocks; bytes past the last are 0. Rows
    of one block repeat its exponent. Strides as in COLUMN_MAJOR. DeepGEMM's
    `get_mn_major_tma_aligned_packed_ue8m0_tensor` after SGLang's `transform_scale_ue8m0`
    (sglang/srt/layers/quantization/fp8_utils.py), for sm_100.
    """


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """A block FP8 format.

    Args:
        block_rows: 128 for weights (blocks of 128 x 128), 1 for groups of 1 x 128.
        powers_of_two: scales are rounded up to a power of two (UE8M0); else they are amax / 448.
        layout: how scales lie in memory; PACKED_UE8M0 holds exponents, so powers of two alone.

    Raises:
        ValueError: one of these does not exist, or two do not go together.
    """

    block_rows: int = BLOCK
    powers_of_two: bool = False
    layout: ScaleLayout = ScaleLayout.ROW_MAJOR

    def __post_init__(self) -> None:
        if self.block_rows not in (1, BLOCK):
            raise ValueError(f"blocks of {self.block_rows} rows do not exist; choose 1 or {BLOCK}")
        if self.is_packed and not self.powers_of_two:
            raise ValueError(
                "packed scales are exponents and cannot hold amax / 448; set powers_of_two"
            )

    @property
    def is_packed(self) -> bool:
        return self.layout is ScaleLayout.PACKED_UE8M0

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.int32 if self.is_packed else torch.float32

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of values [rows, columns] or [experts, rows, columns]."""
        *experts, rows, columns = shape
        scale_rows = rows if self.is_packed else -(-rows // self.block_rows)
        scale_columns = -(-columns // (4 * BLOCK if self.is_packed else BLOCK))
        return (*experts, scale_rows, scale_columns)

    def scale_strides(self, shape: Sequence[int]) -> tuple[int, int]:
        """From row to row and from column to column of scales, in elements."""
        *_, rows, columns = self.scale_shape(shape)
        if self.layout is ScaleLayout.ROW_MAJOR:
            return (columns, 1)
        per_unit = TMA_BYTES // self.scale_dtype.itemsize
        return (1, -(-rows // per_unit) * per_unit)

    def new_scales(self, shape: Sequence[int], device: torch.device | str) -> torch.Tensor:
        """Scales for values of this shape, allocated once by whoever owns them; not filled."""
        scale_shape = self.scale_shape(shape)
        if self.layout is ScaleLayout.ROW_MAJOR:
            return torch.empty(scale_shape, dtype=self.scale_dtype, device=device)
        *experts, rows, columns = scale_shape
        pitch = self.scale_strides(shape)[1]
        whole = torch.zeros((*experts, columns, pitch), dtype=self.scale_dtype, device=device)
        return whole.transpose(-1, -2)[..., :rows, :]

    def check(
        self, name: str, wide: torch.Tensor, values: torch.Tensor, scales: torch.Tensor
    ) -> None:
        """Whether a wide tensor of this name and (values, scales) fit each other.

        Raises:
            BufferMismatchError: dtype, shape, strides, address or device of one does not.
        """
        if wide.dim() not in (2, 3):
            raise BufferMismatchError(
                f"{name} has {wide.dim()} axes",
                follows="blocks are cut from [rows, columns] or [experts, rows, columns]",
                remedy="Give a matrix, or matrices under one leading axis",
            )
        require_dtype(wide, name, WIDE_TYPES)
        require_dtype(values, "values", VALUE_TYPES)
        require_dtype(scales, "scales", (self.scale_dtype,))
        require_shape(values, "values", wide.shape, "each element has one FP8 value")
        columns = wide.shape[-1]
        wanted = self.scale_shape(wide.shape)
        require_shape(scales, "scales", wanted, f"{self} has so many for {list(wide.shape)}")
        for tensor, of in ((values, "values"), (scales, "scales")):
            require_device(tensor, of, wide.device)
        require_rows(wide, name)
        require_matrices(values, "values", (columns, 1), wide.shape[-2] * columns)
        strides = self.scale_strides(wide.shape)
        longest = max(size * stride for size, stride in zip(wanted[-2:], strides, strict=True))
        require_matrices(scales, "scales", strides, longest)
        require_address(values, "values", TMA_BYTES)
        row_major = self.layout is ScaleLayout.ROW_MAJOR
        require_aligned_matrices(
            scales, "scales", scales.element_size() if row_major else TMA_BYTES
        )


def as_experts(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as [experts, rows, columns]: a matrix is one expert. Always a view."""
    return tensor.unsqueeze(0) if tensor.dim() == 2 else tensor
