"""Pages of a KV cache that weights with a NaN have left behind.

A kernel may read a whole page and give the slots behind a request's last token a weight of 0. But
0 x NaN is NaN: after weights that blew up, requests under good ones would answer nonsense, until
every page had been written anew. Forgetting what the pages are of, as a flush does, changes
nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["clear_non_finite"]

_COMPARED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@torch.inference_mode()  # engines make their caches in it, and may then write to them in it alone
def clear_non_finite(tensors: Iterable[torch.Tensor], *, kept: bool) -> int:
    """Write zeros over the caches that hold a NaN or an infinity.

    The caches are read once, and nothing is allocated: by its bandwidth an H200 reads 100 GB in
    some 20 ms. Caches in other formats (FP8, packed) cannot be looked into, and are zeroed each
    time.

    Args:
        tensors: the caches of every layer; no step of the model may be under way.
        kept: whether requests will use what the caches hold. Then only the numbers that are not
            finite are written over, and other formats are left alone.

    Returns:
        How many caches were written to.
    """
    compared, written = [], []
    for tensor in tensors:
        if not tensor.numel():
            continue
        if tensor.dtype in _COMPARED:
            compared.append(tensor)
        elif not kept:
            written.append(tensor)
    if compared:
        # One wait for the device, not one for each layer.
        finite = torch.stack([_is_finite(tensor) for tensor in compared]).tolist()
        written += [each for each, good in zip(compared, finite, strict=True) if not good]
    for tensor in written:
        if kept:
            tensor.nan_to_num_(0.0, 0.0, 0.0)
        else:
            tensor.zero_()
    return len(written)


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(tensor)
    return low.isfinite() & high.isfinite()
