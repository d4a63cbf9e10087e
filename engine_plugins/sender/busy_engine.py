"""An engine that is busy with another call is asked again, within the update's own time.

The engine lets a call wait for another one, but not for ever, and not for an update that somebody
prepared and may never commit. A flush of another team at the wrong millisecond must not cost a
training step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from engine_plugins.admin_answers import UpdateRequest
from engine_plugins.errors import AdminAnswerError, ConflictError, EnginePluginError

__all__ = ["once_it_is_free"]

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
LEAST_S = 1.0
"""An update with less time left than this is not begun."""

Answer = TypeVar("Answer")


def once_it_is_free(request: UpdateRequest, call: Callable[[UpdateRequest], Answer]) -> Answer:
    """Make a call about an update, again and again while another call keeps the engine.

    Args:
        request: the update; its `timeout_s` bounds the waits and the update together.
        call: given the request with the time that is left.

    Raises:
        EnginePluginError: as the call; where the time is over the text says how long was waited.
    """
    began = time.monotonic()
    give_up = began + request.timeout_s
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return call(request)
        except EnginePluginError as error:
            left = give_up - time.monotonic()
            if not _is_busy(error) or left - pause_s < LEAST_S:
                waited = time.monotonic() - began
                if _is_busy(error) and isinstance(error, AdminAnswerError):
                    error.detail += f"; it was asked again for {waited:.1f} s"
                raise
            if pause_s == FIRST_PAUSE_S:
                logger.warning("%s; asking again for at most %.0f s", error, left)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        request = msgspec.structs.replace(request, timeout_s=give_up - time.monotonic())


def _is_busy(error: EnginePluginError) -> bool:
    """Whether an engine refused for what another caller does, and waiting helps."""
    if not (isinstance(error, AdminAnswerError) and error.by_engine):
        return False
    return error.code == ConflictError.code and (error.retry_after or error.state == "updating")
