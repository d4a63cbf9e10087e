"""Calls from an API process to every scheduler rank, each matched with its own answer.

SGLang's `FanOutCommunicator` matches answers by order: a caller that is cancelled leaves its
answer to the next one. Here each call has a number, and any number may be under way.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from sglang.utils import TypeBasedDispatcher

from sglang_ext.messages import EngineAnswer, EngineCall, register_messages

__all__ = ["SchedulerCalls", "attach_to_tokenizer_manager"]

_ATTRIBUTE = "engine_plugins_calls"


class SchedulerCalls:
    """The calls of one API process.

    Args:
        tokenizer_manager: SGLang's, whose connection to the schedulers is used.
    """

    def __init__(self, tokenizer_manager: Any) -> None:
        self._manager = tokenizer_manager
        self._serials = itertools.count()
        self._waiting: dict[int, asyncio.Future[list[bytes]]] = {}

    @staticmethod
    def of(tokenizer_manager: Any) -> SchedulerCalls | None:
        """Those of a tokenizer manager, or None if our hook never saw it."""
        calls: SchedulerCalls | None = getattr(tokenizer_manager, _ATTRIBUTE, None)
        return calls

    async def ask(self, call: str, arguments: bytes) -> list[bytes]:
        """One answer per rank, in rank order. Nothing but the server's end cuts it short."""
        self._manager.auto_create_handle_loop()
        serial = next(self._serials)
        answered = self._waiting[serial] = asyncio.get_running_loop().create_future()
        try:
            self._manager._dispatch_to_scheduler(
                EngineCall(serial=serial, call=call, arguments=arguments)
            )
            ranks: list[bytes] = await answered
            return ranks
        finally:
            self._waiting.pop(serial, None)

    def receive(self, answer: EngineAnswer) -> None:
        """An answer has come; nobody may be waiting for it any more."""
        waiting = self._waiting.get(answer.serial)
        if waiting is not None and not waiting.done():
            waiting.set_result(list(answer.ranks))


def attach_to_tokenizer_manager(result: None, tokenizer_manager: Any) -> None:
    """After `TokenizerManager.init_communicators`: answers find their way to the calls."""
    register_messages()
    calls = SchedulerCalls(tokenizer_manager)
    setattr(tokenizer_manager, _ATTRIBUTE, calls)
    tokenizer_manager._result_dispatcher += TypeBasedDispatcher([(EngineAnswer, calls.receive)])
