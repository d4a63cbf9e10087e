"""A user of the server who knows nothing of updates: one long streamed answer."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field

import httpx

__all__ = ["LongRequest"]


@dataclass(kw_only=True)
class LongRequest:
    """Streams one answer in a thread and notes when each of its tokens came.

    Attributes:
        url: base url of the server.
        tokens: how many it asks for.
        arrivals: unix seconds of each token so far.
        finish_reason: the server's, "length" when all tokens were sent; None while it runs.
        error: what went wrong, if anything did.
    """

    url: str
    tokens: int = 2000
    arrivals: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: str = ""
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._stream, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    @property
    def complete(self) -> bool:
        """Whether every token arrived and the server ended the answer by itself."""
        return self.finish_reason == "length" and len(self.arrivals) == self.tokens

    def spans(self, began: float, ended: float) -> bool:
        """Whether it was being answered through all of a time, given in unix seconds."""
        return bool(self.arrivals) and self.arrivals[0] < began and ended < self.arrivals[-1]

    def _stream(self) -> None:
        request = {
            "prompt": "Tell me a long story. ",
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        url = f"{self.url}/v1/completions"
        try:
            with httpx.stream("POST", url, json=request, timeout=60, trust_env=False) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    self._read(line)
        except httpx.HTTPError as error:
            self.error = f"{type(error).__name__}: {error}"

    def _read(self, line: str) -> None:
        _, _, event = line.partition("data: ")
        if event and event != "[DONE]":
            (choice,) = json.loads(event)["choices"]
            self.arrivals += [time.time()] * len(choice.get("token_ids") or ())
            self.finish_reason = choice["finish_reason"]
