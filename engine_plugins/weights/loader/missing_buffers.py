"""Buffers that a checkpoint holds and an offer leaves out.

A parameter that no tensor fills is missing. A buffer may as well be an engine's own constant, and
nothing about it says which. The loader does: it is given a tensor of the buffer's name, and a
buffer that it fills is one that a checkpoint has to bring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from engine_plugins.weights.loader.loader_watch import TracedCopy
from engine_plugins.weights.loader.numbered_names import kind_of

__all__ = ["missing_buffers"]


def missing_buffers(
    buffers: Mapping[str, torch.Tensor],
    copies: Sequence[TracedCopy],
    fills: Callable[[str, torch.Tensor], set[str]],
) -> set[str]:
    """Those of the buffers that the loader fills when it is asked to.

    Args:
        buffers: that may be saved, and that no copy fills, by name.
        copies: what the loader did with the offer; they show how a checkpoint names things.
        fills: the buffers that the loader fills with a tensor of this name, shaped as this one.
    """
    alike: dict[str, list[str]] = {}
    for name in buffers:
        alike.setdefault(kind_of(name), []).append(name)
    missing: set[str] = set()
    for names in alike.values():
        first = names[0]
        if any(first in fills(name, buffers[first]) for name in _names(first, copies)):
            missing.update(names)
    return missing


def _names(buffer: str, copies: Sequence[TracedCopy]) -> Iterator[str]:
    """Names a checkpoint may have for a buffer: the engine's, and one made as its neighbours'."""
    yield buffer
    renamed: dict[str, str] = {}
    for copy in copies:
        if len(copy.sources) == 1:
            here, there = _without_common_end(copy.parameter, copy.sources[0])
            if here != there and buffer.startswith(here):
                renamed[here] = there
    if renamed:
        longest = max(renamed, key=len)
        yield renamed[longest] + buffer[len(longest) :]


def _without_common_end(one: str, other: str) -> tuple[str, str]:
    first, second = one.split("."), other.split(".")
    while first and second and first[-1] == second[-1]:
        first.pop()
        second.pop()
    return "".join(f"{word}." for word in first), "".join(f"{word}." for word in second)
