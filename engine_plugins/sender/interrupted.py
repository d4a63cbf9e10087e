"""A word about engines that an interrupted update leaves in the middle of something."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing

from engine_plugins.admin_answers import EngineState
from engine_plugins.errors import EnginePluginError
from engine_plugins.sender.access import EngineAccess
from engine_plugins.sender.engines import EngineLink, for_each_engine
from engine_plugins.sender.held_weights import told_of

__all__ = ["warn_of_interrupted"]

logger = logging.getLogger(__name__)

ASKED_S = 1.0
"""For each engine: whoever pressed Ctrl-C does not want to wait."""


def warn_of_interrupted(urls: Sequence[str], access: EngineAccess, version: int) -> None:
    """Say which engines do not serve whole weights now; never raises for an engine.

    Args:
        urls: of the engines; they are asked over connections of their own.
        access: how they are spoken to.
        version: that was on its way.
    """

    def state(link: EngineLink) -> EngineState:
        with closing(link.client):
            return link.client.state()

    links = [EngineLink(access.client(url, timeout_s=ASKED_S)) for url in urls]
    told = [
        f"{url} holds {_held(answer)}"
        for url, answer in for_each_engine(links, state).items()
        if isinstance(answer, EnginePluginError) or answer.state in ("updating", "fenced")
    ]
    if told:
        logger.warning(
            "the update to version %d was broken off: %s. An engine that had begun to install in "
            "place is fenced: it refuses requests until an update to a newer version, or one with "
            "force=True, has brought whole weights",
            version,
            "; ".join(told),
        )


def _held(answer: EngineState | EnginePluginError) -> str:
    if isinstance(answer, EnginePluginError):
        return f"unknown weights: it gave no answer ({answer.code})"
    return told_of(answer)
