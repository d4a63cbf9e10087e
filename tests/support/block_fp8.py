"""Block-FP8 quantization of whole tensors: what every way to cut them has to come to."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine_plugins.weights.sources.forms.block_fp8 import BLOCK, SCALE_SUFFIX, BlockFp8
from engine_plugins.weights.sources.forms.block_fp8_form import BlockFp8Form
from engine_plugins.weights.sources.forms.cast import Cast, SentDtypes
from engine_plugins.weights.sources.forms.form_source import Form
from engine_plugins.weights.sources.forms.quantize_jobs import Quantize

__all__ = ["forms_of", "quantized_whole", "reference"]


def reference(
    weights: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    *,
    powers_of_two: bool = False,
) -> None:
    """A `Quantize` in plain torch, strict about the memory that it is given."""
    assert values.data_ptr() % 16 == 0
    assert values.stride(-1) == 1
    if weights.ndim == 3:
        for each in zip(weights, values, scales, strict=True):
            reference(*each, powers_of_two=powers_of_two)
        return
    rows, columns = weights.shape
    finite = torch.where(weights.isfinite(), weights, 0).float()
    padded = torch.nn.functional.pad(finite, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-4) / 448.0
    if powers_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    each = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    scaled = weights.float() * each.reciprocal()
    scaled = torch.where(scaled.isfinite(), scaled, torch.nan)
    values.copy_(scaled.clamp(-448, 448).to(torch.float8_e4m3fn))
    scales.copy_(scale)


def quantized_whole(tensors: Mapping[str, torch.Tensor], form: BlockFp8) -> dict[str, torch.Tensor]:
    """A checkpoint in block-FP8 form, each tensor quantized as a whole."""
    made: dict[str, torch.Tensor] = {}
    dtypes = SentDtypes(form.others, learns=False)
    for name, tensor in tensors.items():
        if not form.quantizes(name, tensor.shape):
            made[name] = tensor.to(dtypes.of(name, tensor.dtype))
            continue
        made[name] = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        grid = [-(-extent // BLOCK) for extent in tensor.shape]
        made[name + SCALE_SUFFIX] = torch.empty(grid)
        slots = made[name], made[name + SCALE_SUFFIX]
        reference(tensor.contiguous(), *slots, powers_of_two=form.ue8m0)
    return made


def forms_of(form: BlockFp8, quantize: Quantize = reference) -> list[Form]:
    """As a sender puts them together."""
    return [BlockFp8Form(form, quantize), Cast(SentDtypes(form.others, learns=False))]
