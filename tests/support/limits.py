"""A process that may have less of something than it wants."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["NO_DESCRIPTORS", "limited"]

NO_DESCRIPTORS = 3
"""Of `RLIMIT_NOFILE`: standard streams take them, so none is left whatever a thread closes."""


@contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    """This process, and nobody else, gets no more than `soft` of an `RLIMIT_*`."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)
