"""Names that differ by a layer's or an expert's number alone.

Such a number stands between two dots. Others belong to the name: `fc1` and `fc2`, or `w13_weight`
and `w2_weight`, are different things.
"""

from __future__ import annotations

import re

__all__ = ["kind_of", "numbers_in", "renumbered"]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def kind_of(name: str) -> str:
    """A name without its numbers; equal for what differs by them alone."""
    return _NUMBER.sub("#", name)


def numbers_in(name: str) -> list[str]:
    """The numbers of a name, in their order: a layer's, an expert's."""
    return _NUMBER.findall(name)


def renumbered(name: str, there: list[str], here: list[str]) -> str:
    """A name with the numbers `there` turned into those `here`, in their order.

    The name may have others between them, which stay.
    """
    swaps = list(zip(there, here, strict=True))

    def swap(found: re.Match[str]) -> str:
        return swaps.pop(0)[1] if swaps and found.group() == swaps[0][0] else found.group()

    return _NUMBER.sub(swap, name)
