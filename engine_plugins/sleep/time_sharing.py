"""What an engine must be started with where it shares its GPU in time with a trainer."""

from __future__ import annotations

import logging
from typing import Any

from engine_plugins.settings import PREFIX, Settings

__all__ = ["force_memory_saver"]

logger = logging.getLogger(__name__)


def force_memory_saver(arguments: Any, switch: str, settings: Settings, *, on_cpu: bool) -> None:
    """Turn an engine's memory saver on where sleep is configured; nothing else is touched.

    Without it a sleep frees nothing, and the trainer's first allocation fails. To be called where
    the engine's arguments are made whole, before anything is derived from them; repeating is
    harmless.

    Args:
        arguments: the engine's, changed in place.
        switch: the attribute of theirs that turns the memory saver on.
        settings: says whether sleep is configured.
        on_cpu: the engine's memory saver needs a GPU.
    """
    if not settings.sleep or getattr(arguments, switch):
        return
    if on_cpu:
        logger.info(
            "%sSLEEP: %s stays off on the CPU, where pages of tensors are released", PREFIX, switch
        )
        return
    setattr(arguments, switch, True)
    logger.info("%sSLEEP: %s is turned on, without which a sleep frees nothing", PREFIX, switch)
