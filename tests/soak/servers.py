"""Servers as users start them: forks would share pages with where their imports were made."""

from __future__ import annotations

from typing import Any

from tests.chaos_update.cases import ServerKind
from tests.chaos_update.fleet import Fleet

__all__ = ["SoakFleet"]


class SoakFleet(Fleet):
    """Servers whose imports are their own."""

    def options(self, kind: ServerKind) -> dict[str, Any]:
        return {"preload": False}
