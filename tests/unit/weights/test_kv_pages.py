"""What weights with a NaN leave in KV pages does not reach the requests after them."""

from __future__ import annotations

import pytest
import torch

from engine_plugins.weights.memory.kv_pages import clear_non_finite


def cache(dtype: torch.dtype, *bad: float) -> torch.Tensor:
    pages = torch.ones(3, 4, 2, dtype=dtype)
    for slot, value in enumerate(bad):
        pages[1, slot, 0] = value
    return pages.transpose(0, 1)  # engines hold views of their pools


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_only_a_cache_with_a_number_that_is_none_is_zeroed(dtype: torch.dtype, bad: float) -> None:
    good, blown_up, empty = cache(dtype), cache(dtype, bad), torch.empty(0)
    assert clear_non_finite([good, blown_up, empty], kept=False) == 1
    assert torch.equal(good, torch.ones_like(good))
    assert not blown_up.any()


def test_caches_that_were_made_in_inference_mode_are_written_to() -> None:
    with torch.inference_mode():
        blown_up, packed = cache(torch.float32, torch.nan), torch.ones(4, dtype=torch.uint8)
    assert clear_non_finite([blown_up, packed], kept=False) == 2
    assert not blown_up.any()
    assert not packed.any()


def test_what_requests_go_on_with_is_kept() -> None:
    """`in_flight_kv="keep"`: the numbers beside a NaN are theirs."""
    blown_up, packed = cache(torch.float32, torch.nan, torch.inf), torch.ones(4, dtype=torch.uint8)
    assert clear_non_finite([blown_up, packed], kept=True) == 1
    assert blown_up.flatten().sort().values.tolist() == [0, 0] + 22 * [1]
    assert packed.tolist() == [1, 1, 1, 1]


def test_what_cannot_be_looked_into_is_zeroed_with_every_flush() -> None:
    packed = torch.full((4,), 0x7F, dtype=torch.uint8)
    assert clear_non_finite(iter([packed]), kept=False) == 1
    assert not packed.any()
    assert clear_non_finite([], kept=False) == 0
