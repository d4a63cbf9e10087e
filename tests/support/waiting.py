"""Waiting for something to become true."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["until"]


def until(
    reached: Callable[[], bool], *, within_s: float = 20, otherwise: Callable[[], object]
) -> None:
    """Look again and again; fail with what `otherwise` says once the time is over."""
    give_up = time.monotonic() + within_s
    while not reached():
        assert time.monotonic() < give_up, otherwise()
        time.sleep(0.01)
