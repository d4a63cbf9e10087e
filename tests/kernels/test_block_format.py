"""Buffers of a block FP8 format: their shapes, and which are refused, in words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine_kernels import BlockFormat, BufferMismatchError, ScaleLayout, quantize_blocks

PACKED = BlockFormat(powers_of_two=True, layout=ScaleLayout.PACKED_UE8M0)
E4M3 = torch.float8_e4m3fn


def test_shapes_and_strides_of_each_layout() -> None:
    shape = (3, 130, 1000)
    assert BlockFormat().scale_shape(shape) == (3, 2, 8)
    assert BlockFormat(block_rows=1).scale_shape(shape) == (3, 130, 8)
    column_major = BlockFormat(block_rows=1, layout=ScaleLayout.COLUMN_MAJOR)
    assert column_major.new_scales(shape, "cpu").stride() == (132 * 8, 1, 132)
    assert PACKED.scale_shape(shape) == (3, 130, 2)
    assert PACKED.new_scales(shape, "cpu").stride() == (132 * 2, 1, 132)


def test_formats_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="blocks of 64 rows"):
        BlockFormat(block_rows=64)
    with pytest.raises(ValueError, match="set powers_of_two"):
        BlockFormat(layout=ScaleLayout.PACKED_UE8M0)


def good() -> dict[str, torch.Tensor]:
    weights = torch.zeros(2, 256, 512, dtype=torch.bfloat16)
    values = torch.zeros(weights.shape, dtype=E4M3)
    return {"weights": weights, "values": values, "scales": PACKED.new_scales(weights.shape, "cpu")}


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same, one element further on in memory."""
    whole = torch.zeros(tensor.numel() + 1, dtype=torch.uint8).view(tensor.dtype)
    return whole[1:].view(tensor.shape)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("weights", lambda t: t.double(), "weights is float64, not bfloat16 or float32"),
        ("weights", lambda t: t[None], "weights has 4 axes"),
        ("weights", lambda t: t.mT.contiguous().mT, "elements of a row of weights are 256 apart"),
        ("values", lambda t: t.view(torch.uint8), "values is uint8, not float8_e4m3fn"),
        ("values", lambda t: t[:, :255], r"values has shape \[2, 255, 512\], not \[2, 256, 512\]"),
        ("values", lambda t: torch.zeros(2, 256, 1024, dtype=E4M3)[..., :512], "values has stride"),
        ("values", lambda t: t[:1].expand(2, 256, 512), "overwrite each other"),
        ("values", shifted, "values begins 1 bytes past a multiple of 16"),
        ("values", lambda t: t.to("meta"), "values is on meta, the other tensors on cpu"),
        ("scales", lambda t: t.float(), "scales is float32, not int32"),
        ("scales", lambda t: t[..., :0], r"scales has shape \[2, 256, 0\], not \[2, 256, 1\]"),
        ("scales", lambda t: t.repeat(1, 1, 3)[..., ::3], "scales has strides"),
        (
            "scales",
            lambda t: t.new_zeros(2 * 257).as_strided((2, 256, 1), (257, 1, 256)),
            "matrices of scales are 1028 bytes apart",
        ),
    ],
)
def test_a_wrong_buffer_is_refused_in_words(
    name: str, spoil: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    """What was seen, what follows and what to do; nothing is written."""
    given = good()
    given[name] = spoil(given[name])
    untouched = given["values"].clone() if name != "values" else None
    with pytest.raises(BufferMismatchError, match=said):
        quantize_blocks(**given, block_format=PACKED)
    if untouched is not None:
        assert torch.equal(given["values"].view(torch.uint8), untouched.view(torch.uint8))


def test_matrices_of_one_parameter_may_be_apart() -> None:
    """The gate and the up half of each expert go into one slot, which nothing else enters."""
    slot = torch.full((2, 512, 256), 0x11, dtype=torch.uint8).view(E4M3)
    scales = torch.full((2, 4, 2), -1.0)
    up = torch.randn(2, 256, 256)
    quantize_blocks(up, slot[:, 256:], scales[:, 2:])
    assert bool((slot[:, :256].view(torch.uint8) == 0x11).all())
    assert bool((scales[:, :2] == -1).all())
    assert bool((scales[:, 2:] > 0).all())


def test_nothing_to_quantize_is_no_error() -> None:
    quantize_blocks(
        torch.zeros(0, 128, 128), torch.zeros(0, 128, 128, dtype=E4M3), torch.zeros(0, 1, 1)
    )
