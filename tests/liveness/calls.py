"""Stuck states around a pause, a sleep and a wake, whose caller waits as a trainer does."""

from __future__ import annotations

import http.client
import json
import threading
from typing import Any, Protocol

import httpx

from tests.chaos_update.trainer import Outcome
from tests.support.engine_server import TOKEN, EngineServer
from tests.support.waiting import until

__all__ = ["CALLS", "Call", "Waiting", "begin_call"]

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "sleep": ("/sleep", {"level": 1, "timeout_s": 5}),
    "wake": ("/wake", {}),
    "hold": ("/pause", {"hold_s": 5}),
    "drain": ("/pause", {"mode": "wait", "timeout_s": 5}),
}
"""By phase: what is asked. Of `hold` the answer has come when something happens."""


class Waiting(Protocol):
    """Somebody who waits for an answer."""

    @property
    def answered(self) -> bool: ...
    def outcome(self, within_s: float) -> Outcome: ...


class Call:
    """A POST to an admin route, waited for in a thread.

    Attributes:
        port: our end of its connection.
    """

    def __init__(self, server: EngineServer, path: str, body: dict[str, Any]) -> None:
        url = httpx.URL(server.url)
        self._connection = http.client.HTTPConnection(url.host, url.port, timeout=120)
        self._connection.connect()
        self.port: int = self._connection.sock.getsockname()[1]
        self._error = ""
        self._thread = threading.Thread(target=self._run, args=(path, body), daemon=True)
        self._thread.start()

    @property
    def answered(self) -> bool:
        """Whether it is over."""
        return not self._thread.is_alive()

    def outcome(self, within_s: float) -> Outcome:
        """What was answered."""
        self._thread.join(within_s)
        return Outcome(error=f"no end within {within_s:g} s" if not self.answered else self._error)

    def _run(self, path: str, body: dict[str, Any]) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        try:
            self._connection.request("POST", f"/admin/v1{path}", json.dumps(body), headers)
            answer = self._connection.getresponse()
            text = answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            self._error = f"{type(error).__name__}: {error}"
            return
        if answer.status != 200:
            self._error = f"{answer.status} {text}"


def begin_call(server: EngineServer, phase: str) -> Call:
    """Ask for what a phase is about; of a held pause the answer is waited for."""
    call = Call(server, *CALLS[phase])
    if phase == "hold":
        until(lambda: call.answered, within_s=20, otherwise=lambda: "no answer to a pause")
    return call
