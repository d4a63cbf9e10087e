"""A line through measured peaks that a thousand steps of one size neither bend nor outweigh.

Samples are kept by size, a few of each power of two, and the line is Theil and Sen's through the
medians of the sizes: the median of the slopes between pairs, weighted by how far the two lie apart.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["PRIOR_INTERCEPT_BYTES", "FittedLine", "Sample"]

KEPT_PER_SIZE = 8
LARGEST_REFIT_GAP = 256
PROVEN_SPREAD = 4
"""The largest size over the smallest, from which on their slope is believed."""
PROVEN_GROWTH_BYTES = 2 << 20
"""What the ends must differ by: an allocator's noise is half a MiB."""
REACH = 8
"""How far beyond the largest size that was measured the line is believed."""
PRIOR_INTERCEPT_BYTES = 4 << 20


class Sample(NamedTuple):
    """A step: what it should take and what it took, in bytes, and when (seconds of the epoch)."""

    expected: float
    measured: float
    at: float


class FittedLine:
    """Measured bytes as a line over expected bytes; the prior itself until sizes prove another.

    Where about one size was measured the line goes from the prior's intercept along the ray to what
    was seen. That is too much for other sizes, and never too little.

    Args:
        expire_s: samples that are older are forgotten.
    """

    def __init__(self, *, expire_s: float = math.inf) -> None:
        self._expire_s = expire_s
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.intercept = float(PRIOR_INTERCEPT_BYTES)
        self.slope = 1.0
        self.proven_up_to = 0.0
        """Expected bytes up to which the line is believed; 0 for a prior."""
        self._sizes: dict[int, deque[Sample]] = {}
        self._errors: list[float] = []
        self._warm: set[int] = set()
        self._since_refit = 0
        self._seen = 0

    @property
    def samples(self) -> list[Sample]:
        """What the line was made from, by size."""
        return [sample for size in sorted(self._sizes) for sample in self._sizes[size]]

    def add(self, sample: Sample) -> bool:
        """Take a sample in, unless it is the first of its size; say whether the line is new.

        The first step of a size is cold: kernels are chosen and caches filled.
        """
        size = int(sample.expected).bit_length()
        if size not in self._warm:
            self._warm.add(size)
            return False
        self._keep(size, sample)
        self._seen += 1
        self._since_refit += 1
        if self._since_refit < min(LARGEST_REFIT_GAP, 1 + self._seen // 8):
            return False
        self.refit(sample.at)
        return True

    def lacks(self, expected: float) -> bool:
        """Whether fewer samples of this size are kept than there is room for."""
        return len(self._sizes.get(int(expected).bit_length(), ())) < KEPT_PER_SIZE

    def restore(self, samples: Iterable[Sample], now: float) -> None:
        """Begin with the samples of an earlier process."""
        for sample in samples:
            self._keep(int(sample.expected).bit_length(), sample)
        self.refit(now)

    def error_quantile(self, quantile: float) -> float:
        """What the samples lie above the line by, at this quantile; 0 if they lie below."""
        return max(_quantile(self._errors, quantile), 0.0)

    def relative_error(self, quantile: float) -> float:
        """How far the samples lie from the line, over what was measured, at this quantile."""
        errors = (
            abs(each.measured - self.intercept - self.slope * each.expected) / each.measured
            for each in self.samples
            if each.measured > 0
        )
        return _quantile(sorted(errors), quantile)

    def refit(self, now: float) -> None:
        """Draw the line anew, without what has expired."""
        self._since_refit = 0
        self._expire(now - self._expire_s)
        points = [
            (
                statistics.median([each.expected for each in kept]),
                statistics.median([each.measured for each in kept]),
            )
            for _, kept in sorted(self._sizes.items())
        ]
        self.intercept, self.slope, self.proven_up_to = _line(points)
        self._errors = sorted(
            each.measured - self.intercept - self.slope * each.expected for each in self.samples
        )

    def _keep(self, size: int, sample: Sample) -> None:
        self._sizes.setdefault(size, deque(maxlen=KEPT_PER_SIZE)).append(sample)

    def _expire(self, before: float) -> None:
        for size, kept in list(self._sizes.items()):
            fresh = [sample for sample in kept if sample.at >= before]
            if len(fresh) < len(kept):
                self._sizes[size] = deque(fresh, maxlen=KEPT_PER_SIZE)
            if not fresh:
                del self._sizes[size]


def _quantile(ordered: list[float], quantile: float) -> float:
    if not ordered:
        return 0.0
    return ordered[max(math.ceil(quantile * len(ordered)) - 1, 0)]


def _line(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Intercept, slope and how far they are believed, from points in the order of their size."""
    if not points:
        return PRIOR_INTERCEPT_BYTES, 1.0, 0.0
    (least, bottom), (most, top) = points[0], points[-1]
    if most < PROVEN_SPREAD * least or top - bottom < PROVEN_GROWTH_BYTES:
        return _ray(points)
    slope = max(_median_slope(points), 0.0)
    intercept = statistics.median([y - slope * x for x, y in points])
    return intercept, slope, REACH * most


def _ray(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """The same of sizes too close to each other for a line of their own.

    Of steps that are expected to take next to nothing only the intercept can be told.
    """
    telling = [(x, y) for x, y in points if x >= PROVEN_GROWTH_BYTES]
    if not telling:
        over = max(y - x for x, y in points)
        return max(over, 0.0), 1.0, PROVEN_GROWTH_BYTES
    slope = max(y / x for x, y in telling)
    return PRIOR_INTERCEPT_BYTES, slope, 2 * telling[-1][0]


def _median_slope(points: list[tuple[float, float]]) -> float:
    slopes = sorted(
        ((y2 - y1) / (x2 - x1), x2 - x1)
        for (x1, y1), (x2, y2) in itertools.combinations(points, 2)
        if x2 > x1
    )
    half = sum(weight for _, weight in slopes) / 2
    for slope, weight in slopes:
        half -= weight
        if half <= 0:
            return slope
    return slopes[-1][0]
