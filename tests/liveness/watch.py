"""What trainers and clients see of a server from the moment on in which something went wrong."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.chaos_update.clients import ask
from tests.chaos_update.fleet import Target
from tests.chaos_update.models import SHORT
from tests.liveness.calls import Waiting
from tests.liveness.leftovers import Owned
from tests.support.engine_server import TOKEN, EngineServer

__all__ = ["Watch", "exit_status"]

LOOK_S = 0.2
HELD_S = 3.0
"""A short request that has no answer in this time is held."""
STEADY_S = 1.5
"""For so long nothing may change any more."""
FITS = {"serving": "answered", "fenced": "refused", "asleep": "held", "paused": "held"}
"""What becomes of requests where /state says the truth."""


@dataclass
class _Line:
    """What was seen, change by change: `since[-1]` is when it became what it still is."""

    what: str = ""
    since: float = 0.0
    seen: int = 0
    changes: list[tuple[float, str]] = field(default_factory=list)

    def add(self, at: float, what: str) -> None:
        self.seen += 1
        if what != self.what:
            self.what, self.since = what, at
            self.changes.append((round(at, 1), what))


class Watch:
    """Looks at a server from now on: its /state, its door, its processes, and a trainer.

    One that has to end is looked at `to_the_end`.

    Attributes:
        state: the last answer of /state.
        told_s: when the trainer had control back.
        told: what it was told.
        gone_s: when all processes of the server had ended.
    """

    def __init__(
        self,
        target: Target,
        owned: Owned,
        trainer: Waiting | None,
        *,
        knocks: bool = True,
        to_the_end: bool = False,
    ) -> None:
        self._target, self._owned, self._trainer = target, owned, trainer
        self._to_the_end = to_the_end
        self._began = time.monotonic()
        self._states, self._door = _Line(), _Line()
        self._client = httpx.Client(
            base_url=f"{target.server.url}/admin/v1",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=2,
        )
        self._ended = threading.Event()
        self.state: dict[str, Any] = {}
        self.told_s: float | None = None
        self.told = ""
        self.gone_s: float | None = None
        self._threads = [
            threading.Thread(target=self._repeat, args=(look,), daemon=True)
            for look in (self._look, self._listen, *((self._knock,) if knocks else ()))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def now(self) -> float:
        """Seconds since the watch began."""
        return time.monotonic() - self._began

    @property
    def true_s(self) -> float | None:
        """When /state became what it stayed, if that is no `updating` and fits the door."""
        return self._states.since if self._true else None

    @property
    def door_s(self) -> float | None:
        """When requests were answered or refused, and ever after."""
        return self._door.since if self._door.what in ("answered", "refused") else None

    @property
    def changes(self) -> str:
        """What was seen, in short."""
        return f"/state {self._states.changes}, requests {self._door.changes}"

    @property
    def _true(self) -> bool:
        return FITS.get(self._states.what) == self._door.what

    def wait(self, within_s: float, *, for_trainer: bool = False) -> None:
        """Until nothing changes any more, or the trainer is told, or a time is over."""
        over = (lambda: self.told_s is not None) if for_trainer else self._steady
        while self.now < within_s and not over():
            time.sleep(LOOK_S)

    def settle(self, within_s: float) -> None:
        """Wait, from now on, until nothing changes any more."""
        time.sleep(STEADY_S)
        self.wait(self.now + within_s)

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        for thread in self._threads:
            thread.join(HELD_S + 2)
        self._client.close()

    def _steady(self) -> bool:
        told = self._trainer is None or self.told_s is not None
        if self.gone_s is not None or self._to_the_end:  # it may be fenced, and then end
            return told and self.gone_s is not None
        last = max(self._states.since, self._door.since, self.told_s or 0)
        return told and self._true and self.now > last + STEADY_S

    def _repeat(self, look: Callable[[], None]) -> None:
        while not self._ended.wait(LOOK_S):
            look()

    def _look(self) -> None:
        """One look at /state, on a connection that stays while it can."""
        at = self.now
        try:
            answer = self._client.get("/state")
            answer.raise_for_status()
        except httpx.HTTPError as error:
            self._states.add(at, f"no answer: {type(error).__name__}")
            return
        self.state = answer.json()
        self._states.add(at, self.state["state"])

    def _knock(self) -> None:
        at = self.now
        broken = ask(self._target.server, SHORT[0], 2, give_up_s=HELD_S).broken
        held = "Timeout" in broken
        self._door.add(at, "held" if held else "refused" if broken else "answered")

    def _listen(self) -> None:
        if self.gone_s is None and not self._owned.running():
            self.gone_s = self.now
        if self._trainer is not None and self.told_s is None and self._trainer.answered:
            self.told_s = self.now
            self.told = self._trainer.outcome(0).error or "done"


def exit_status(server: EngineServer) -> int | None:
    """Of the server's first process, which is left to be waited for; None while it runs."""
    try:
        found = os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
