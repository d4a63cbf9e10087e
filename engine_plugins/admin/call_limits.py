"""How long each call to an engine may take, in seconds.

Calls of an update end with the update instead, see `BoundedControl.until`.
"""

from __future__ import annotations

__all__ = [
    "CLOSING_S",
    "LOOK_S",
    "ORDINARY_S",
    "STILL_S",
    "STOPPED_S",
    "UPDATE_GRACE_S",
    "limit_of",
]

ORDINARY_S = 20.0
"""What an engine does between two of its steps. A client waits for 30 s."""

UPDATE_GRACE_S = 1.5
"""How long after an update's deadline a call of it may still be open."""

CLOSING_S = 5.0
"""Giving up: a rank lets transfers that are under way end, see `STOP_S`."""

STILL_S = 0.5
"""The same, of an engine that has not answered before: it is told, but not waited for."""

STOPPED_S = 8.0
"""Outside of an update: a process that has been stopped for so long is not waited for."""

LOOK_S = 0.5
"""How often a call that is open looks at the engine's processes."""

_LIMITS = {
    "connect": 300.0,
    "manifest": 120.0,
    "release": 300.0,
    "restore": 300.0,
    "staging_room": 60.0,
}
"""What may take longer: a plan traces the loader, a sleep copies the weights."""


def limit_of(call: str) -> float:
    """How long a call outside of an update may take."""
    return _LIMITS.get(call, ORDINARY_S)
