"""Waiting for what is queued on GPUs, on whichever stream."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["finish_queued_work"]


def finish_queued_work(tensors: Iterable[torch.Tensor]) -> None:
    """Wait until all that was launched on the GPUs of some tensors is done.

    An optimizer's step may run on a stream of its own, and a copy goes to the current one: without
    this it may read what the step has not written yet, and a wire reads without any stream.
    """
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)
