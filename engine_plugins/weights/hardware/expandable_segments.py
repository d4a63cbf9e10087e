"""Whether torch's CUDA memory is of expandable segments, which network cards cannot read.

Such a segment is a range of virtual addresses over many physical handles (cuMemCreate, cuMemMap). A
card's driver takes the range at registration, and the card fails to walk it at the first transfer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

__all__ = ["WHY_NOT", "asked_for", "expandable_ranges", "named_in", "says_expandable"]

WHY_NOT = (
    "a network card takes memory of expandable segments at registration and cannot walk its "
    "addresses at the first transfer"
)

_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_SETTING = re.compile(r"(?:^|,)\s*expandable_segments\s*:\s*(\w+)")


def asked_for(environ: Mapping[str, str] = os.environ) -> str | None:
    """What turns expandable segments on, in words; `None` where they are off.

    The allocator itself is asked where it can be, since programs change its settings at run time
    (`torch.cuda.memory._set_allocator_settings`). A torch that cannot be asked is taken to follow
    either of its two environment variables.
    """
    named = named_in(environ)
    live = _live()
    if live is False or (live is None and named is None):
        return None
    return named or "a setting made at run time"


def named_in(environ: Mapping[str, str]) -> str | None:
    """The variable that asks for them, with its value, whatever the allocator makes of it."""
    name = next((name for name in _NAMES if says_expandable(environ.get(name, ""))), None)
    return name and f"{name}={environ[name]}"


def says_expandable(settings: str) -> bool:
    """Whether allocator settings (`a:1,expandable_segments:True`) turn them on."""
    values = _SETTING.findall(settings)
    return bool(values) and values[-1].lower() == "true"


def expandable_ranges(segments: Iterable[Mapping[str, Any]] | None = None) -> list[range]:
    """Address ranges of expandable segments, as the allocator lists its own.

    Args:
        segments: as `torch.cuda.memory_snapshot()` gives them, which is the default.
    """
    if segments is None:
        segments = torch.cuda.memory_snapshot() if torch.cuda.is_initialized() else []
    return [
        range(segment["address"], segment["address"] + segment["total_size"])
        for segment in segments
        if segment.get("is_expandable")
    ]


def _live() -> bool | None:
    """What the allocator says; `None` where it cannot be asked."""
    read: Callable[[], str] | None = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if read is not None:
        return says_expandable(read())
    if not torch.cuda.is_initialized():
        return None
    settings = torch.cuda.memory._snapshot().get("allocator_settings", {})
    return bool(settings["expandable_segments"]) if "expandable_segments" in settings else None
