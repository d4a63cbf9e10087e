"""Waiting until memory stands still: a driver gives it back some time after it was asked to."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable

from engine_plugins.sleep.memory_report import MemorySample, Settled

__all__ = ["DEADLINE_S", "settled"]

DEADLINE_S = 5.0
POLL_S = 0.05
WINDOW_S = 0.15
"""Samples so far apart must agree: from one poll to the next, slow change looks like none."""
TOLERANCE_BYTES = 64 << 20
TOLERANCE_SHARE = 0.02
DRIFT_BYTES = 16 << 20
"""Change all one way, by more than this over the window, is movement within the tolerance as well:
of 100 GiB the tolerance is 2, which a driver may take all that time to give back."""


def settled(
    sample: Callable[[], MemorySample],
    *,
    deadline_s: float = DEADLINE_S,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Settled:
    """Probe until all samples of `WINDOW_S` lie within max(64 MiB, 2 %), or the deadline passes.

    They must not go steadily one way either. Samples without a figure agree if they have one
    reason. Time that probes take counts, so the answer comes within a window and two polls of
    memory being stable.
    """
    began = monotonic()
    taken: deque[tuple[float, MemorySample]] = deque()
    count = 0
    while True:
        now = monotonic()
        latest = sample()
        taken.append((now, latest))
        count += 1
        while len(taken) > 2 and now - taken[1][0] >= WINDOW_S:
            taken.popleft()
        still = now - taken[0][0] >= WINDOW_S and _agree([each for _, each in taken])
        seconds = monotonic() - began
        if still or seconds + POLL_S > deadline_s:
            return Settled(sample=latest, settled=still, seconds=seconds, samples=count)
        sleep(POLL_S)


def _agree(samples: list[MemorySample]) -> bool:
    figures = [each.resident_bytes for each in samples if each.resident_bytes is not None]
    if not figures:
        return len({each.reason for each in samples}) == 1
    tolerance = max(TOLERANCE_BYTES, TOLERANCE_SHARE * max(figures))
    near = len(figures) == len(samples) and max(figures) - min(figures) <= tolerance
    return near and not _drifts(figures)


def _drifts(figures: list[int]) -> bool:
    steps = [later - earlier for earlier, later in itertools.pairwise(figures)]
    one_way = all(step > 0 for step in steps) or all(step < 0 for step in steps)
    return len(steps) > 1 and one_way and abs(figures[-1] - figures[0]) > DRIFT_BYTES
