"""Waiting for something to become true."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["until"]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.05
"""Between two looks: most are requests, and take time from whom they wait for."""


def until(
    reached: Callable[[], bool], *, within_s: float = 20, otherwise: Callable[[], object]
) -> None:
    """Look again and again; fail with what `otherwise` says once the time is over."""
    give_up, pause_s = time.monotonic() + within_s, FIRST_PAUSE_S
    while not reached():
        assert time.monotonic() < give_up, otherwise()
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)
