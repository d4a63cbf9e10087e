"""What an engine's loader says of a tensor that it refuses, cut to what a person reads.

Loaders put every name that they know into the text, in an order that changes from run to run.
"""

from __future__ import annotations

import re

__all__ = ["short_reason"]

_SHOWN = 4
_LONGEST = 500
_NAMES = re.compile(r"([\[{(])((?:'[^']*'|\"[^\"]*\")(?:, (?:'[^']*'|\"[^\"]*\"))*),?([\]})])")
_NAME = re.compile(r"'[^']*'|\"[^\"]*\"")


def short_reason(error: Exception) -> str:
    """The class and the text of an error: of a long list the first names, sorted, and how many."""
    text = _NAMES.sub(_shortened, " ".join(str(error).split()))
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]} ... ({len(text) - _LONGEST} more characters)"
    return f"{type(error).__name__}: {text}".rstrip(": ")


def _shortened(found: re.Match[str]) -> str:
    names = sorted(_NAME.findall(found[2]))
    if len(names) <= _SHOWN:
        return found[0]
    return f"{found[1]}{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more{found[3]}"
