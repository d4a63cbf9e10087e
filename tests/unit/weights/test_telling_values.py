"""Values that would look the same in another layout are told from values that would not."""

from __future__ import annotations

import pytest
import torch

from engine_plugins.weights.loader.telling_values import pattern_like, tell_places_apart

RANDOM = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(64, 48),
        torch.ones(64),
        torch.full((64, 48), torch.nan),
        RANDOM[:1].expand(64, 48),
        RANDOM[:, :1].expand(64, 48),
        RANDOM[:4].repeat(16, 1),
        RANDOM[:, :4].repeat(1, 12),
        torch.eye(64),
        RANDOM[:32, :32] + RANDOM[:32, :32].T,
        RANDOM.sign(),
        torch.arange(16).repeat(8).float(),
        torch.zeros(3, 1, 5),
    ],
    ids=[
        "zeros",
        "ones",
        "nan",
        "equal rows",
        "equal columns",
        "rows that repeat",
        "columns that repeat",
        "identity",
        "symmetric",
        "signs",
        "a period",
        "few zeros",
    ],
)
def test_a_constant_or_repeating_tensor_tells_nothing(tensor: torch.Tensor) -> None:
    assert not tell_places_apart([tensor])


@pytest.mark.parametrize(
    "tensor",
    [
        RANDOM,
        RANDOM.bfloat16(),
        RANDOM.to(torch.float8_e4m3fn),
        RANDOM.T,
        RANDOM[0],
        RANDOM[None, 0],
        torch.randint(-8, 8, (3, 32, 32)).to(torch.int8),
        RANDOM[0, 0],
        torch.zeros(1),
    ],
)
def test_random_values_tell_places_apart(tensor: torch.Tensor) -> None:
    assert tell_places_apart([tensor])


def test_parts_of_a_parameter_that_are_equal_tell_nothing() -> None:
    """Experts that are copies of each other, or their scales that are all one."""
    assert tell_places_apart([RANDOM, RANDOM + 1])
    assert not tell_places_apart([RANDOM, RANDOM.clone()])
    assert not tell_places_apart([torch.ones(1), torch.ones(1)])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8]
)
@pytest.mark.parametrize("shape", [(2_100_000,), (32, 1031, 64), (16, 16), (1,)])
def test_a_pattern_has_the_shape_and_the_dtype_and_tells_places_apart(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    like = torch.zeros(shape, dtype=dtype)
    made = pattern_like(like, seed=3)
    assert (made.shape, made.dtype) == (like.shape, dtype)
    assert tell_places_apart([made])
    other = pattern_like(like, seed=4)
    assert shape == (1,) or not torch.equal(made.view(torch.uint8), other.view(torch.uint8))
