"""How much a quantity grows from step to step, whatever its jumps and its noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["growth"]


def growth(samples: Sequence[float]) -> float:
    """The median of the slopes of all pairs of samples (Theil and Sen), per step.

    A line by least squares would tilt with one late jump of an allocator.
    """
    values = np.asarray(samples, dtype=float)
    first, second = np.triu_indices(len(values), 1)
    return float(np.median((values[second] - values[first]) / (second - first)))
