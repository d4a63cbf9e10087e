"""Requests in flight while a test does something else."""

from __future__ import annotations

import threading

from tests.support.engine_server import EngineServer
from tests.support.waiting import until

__all__ = ["Stream"]


class Stream(threading.Thread):
    """A long streaming request in flight.

    Attributes:
        ids: what has come so far.
        finish_reason: why it ended, once it has: `length`, `abort`, `error`.
    """

    def __init__(self, server: EngineServer, prompt: list[int], tokens: int) -> None:
        super().__init__(daemon=True)
        self._server, self._prompt, self._wanted = server, prompt, tokens
        self._failure: Exception | None = None
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self.start()

    def run(self) -> None:
        try:
            for event in self._server.stream(self._prompt, self._wanted):
                self.ids += event.token_ids
                self.finish_reason = event.finish_reason or self.finish_reason
        except Exception as failure:  # shown by the test's own thread
            self._failure = failure

    def wait_for(self, tokens: int) -> None:
        """Wait until so many tokens have come."""
        until(
            lambda: len(self.ids) >= tokens or not self.is_alive(),
            within_s=30,
            otherwise=lambda: f"only {len(self.ids)} tokens came",
        )

    def result(self) -> list[int]:
        """All ids, once the stream has ended."""
        self.join(60)
        assert not self.is_alive(), "the stream hangs"
        if self._failure is not None:
            raise self._failure
        return self.ids
