"""Weights that go wrong easily, one kind for each expert, and the formats to quantize them in."""

from __future__ import annotations

import torch

from engine_kernels import BlockFormat, ScaleLayout

__all__ = ["FORMATS", "hard_weights", "poisoned"]

FORMATS = [
    BlockFormat(block_rows=rows, powers_of_two=powers_of_two, layout=layout)
    for rows in (128, 1)
    for powers_of_two, layout in (
        (False, ScaleLayout.ROW_MAJOR),
        (True, ScaleLayout.ROW_MAJOR),
        (False, ScaleLayout.COLUMN_MAJOR),
        (True, ScaleLayout.PACKED_UE8M0),
    )
]


def hard_weights(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[8, rows, columns]: random over many magnitudes, small, ties, huge, tiny, zeros, broken."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator)

    spread = normal() * torch.exp2(torch.randint(-20, 20, (rows, columns), generator=generator))
    subnormal_values = normal().clamp(-1, 1) * 2.0**-8
    subnormal_values[:, ::50] = 448.0
    ties = torch.randint(-(1 << 11), 1 << 11, (rows, columns), generator=generator) * 2.0**-11
    ties[:, ::100] = 448.0
    huge = normal().sign() * torch.finfo(dtype).max
    huge[:, 1::2] *= torch.rand(rows, columns // 2, generator=generator)
    float_subnormal = normal() * 2.0**-130
    zeros = torch.zeros(rows, columns)
    zeros[:, ::3] = -0.0
    broken = normal()
    broken[::3, ::7] = torch.nan
    broken[1::3, ::5] = torch.inf
    broken[2::3, 1::5] = -torch.inf
    all_broken = torch.full((rows, columns), torch.inf)
    all_broken[:, ::2] = -torch.nan
    kinds = [spread, subnormal_values, ties, huge, float_subnormal, zeros, broken, all_broken]
    return torch.stack(kinds).to(dtype)


def poisoned(
    block_format: BlockFormat, shape: torch.Size, byte: int, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales with this in every byte."""
    values = torch.full(shape, byte, dtype=torch.uint8, device=device)
    scales = block_format.new_scales(shape, device)
    scales.fill_(int.from_bytes(bytes([byte] * 4), "little", signed=True))
    return values.view(torch.float8_e4m3fn), scales
