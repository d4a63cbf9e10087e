"""Our messages between SGLang's API processes and its schedulers, and among those."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import BaseReq, hook_custom_types

__all__ = ["EngineAnswer", "EngineCall", "GateFigures", "register_messages"]


class EngineCall(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """A call for every scheduler rank; SGLang broadcasts it in the order of all its messages."""

    serial: int
    """Which call of its API process this is; the answer says the same."""
    call: str
    arguments: bytes


class EngineAnswer(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """What every rank answered, in rank order; rank 0 sends it."""

    serial: int
    ranks: list[bytes]


class GateFigures(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """What the first scheduler rank has read of all ranks' memory, for all to decide by."""

    figures: Any
    """`StepFigures`. It never leaves the schedulers, which pickle what they hand on."""


def register_messages() -> None:
    """Have SGLang's decoder of this process know them."""
    hook_custom_types(EngineCall, EngineAnswer)
