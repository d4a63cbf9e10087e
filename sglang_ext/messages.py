"""Our two messages between SGLang's API processes and its schedulers."""

from __future__ import annotations

from sglang.srt.managers.io_struct import BaseReq, hook_custom_types

__all__ = ["EngineAnswer", "EngineCall", "register_messages"]


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


def register_messages() -> None:
    """Have SGLang's decoder of this process know them."""
    hook_custom_types(EngineCall, EngineAnswer)
