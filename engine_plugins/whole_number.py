"""Whole numbers as callers have them: Python's, numpy's, and torch's tensors of one element."""

from __future__ import annotations

import operator
from typing import SupportsIndex

from engine_plugins.errors import SettingsError

__all__ = ["whole_number"]


def whole_number(given: SupportsIndex, name: str) -> int:
    """A number that a caller gave, as Python's own.

    Args:
        given: anything that Python takes as an index, and no bool of any kind.
        name: what it is, for the error.

    Raises:
        SettingsError: it is none.
    """
    kind = str(getattr(given, "dtype", type(given).__name__))
    try:
        if "bool" not in kind:
            return operator.index(given)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise SettingsError(
        f"{name} is {given!r}, not a whole number",
        remedy="give an int, or what has __index__: one of numpy's or torch's integers",
    )
