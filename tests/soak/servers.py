"""Servers that are soaked: each has imports of its own, and gives freed memory back at once.

Forks would share pages with the process that made their imports. By default glibc keeps freed
memory in an arena for each of many threads, and these fill for hundreds of updates.
"""

from __future__ import annotations

from typing import Any

from tests.chaos_update.cases import ServerKind
from tests.chaos_update.fleet import Fleet
from tests.support.gate_models import PINNED_ALLOCATOR

__all__ = ["SoakFleet"]


class SoakFleet(Fleet):
    """Servers whose imports are their own."""

    def options(self, kind: ServerKind) -> dict[str, Any]:
        return {"preload": False, "environment": dict(PINNED_ALLOCATOR)}
