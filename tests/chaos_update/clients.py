"""Clients of an engine under load, and answers together with the engine's own version fields."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from tests.chaos_update.judge import Answer, Span
from tests.chaos_update.models import LONG, SHORT
from tests.support.engine_server import EngineServer, server_events

__all__ = ["ask", "under_load"]

GIVE_UP_S = 12.0
_ROUTE = {"vllm": "/inference/v1/generate", "sglang": "/generate"}


def ask(
    server: EngineServer,
    prompt: Sequence[int],
    tokens: int,
    *,
    stream: bool = False,
    give_up_s: float = GIVE_UP_S,
) -> Answer:
    """Ask for greedy tokens; whatever becomes of it is an answer."""
    got: list[int] = []
    spans: tuple[Span, ...] | None = None
    broken = ""
    with httpx.Client(base_url=server.url, timeout=give_up_s) as http:
        try:
            for event in _events(server.kind, http, prompt, tokens, stream=stream):
                spans = _take(server.kind, event, got) or spans
        except (httpx.HTTPError, KeyError) as error:
            broken = f"{type(error).__name__}: {error}"
    whole = len(got) == tokens and not broken
    return Answer(
        prompt=tuple(prompt),
        tokens=tuple(got),
        spans=spans,
        broken="" if whole else broken or f"ended after {len(got)} tokens",
    )


def _events(
    kind: str, http: httpx.Client, prompt: Sequence[int], tokens: int, *, stream: bool
) -> Iterator[dict[str, Any]]:
    if kind == "vllm":
        chosen = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body: dict[str, Any] = {"token_ids": list(prompt), "sampling_params": chosen}
    else:
        chosen = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": list(prompt), "sampling_params": chosen}
    if stream:
        yield from server_events(http, _ROUTE[kind], {**body, "stream": True})
    else:
        answer = http.post(_ROUTE[kind], json=body)
        answer.raise_for_status()
        yield answer.json()


def _take(kind: str, event: dict[str, Any], got: list[int]) -> tuple[Span, ...] | None:
    """Add an event's tokens; the spans, where it has them. SGLang repeats all tokens so far."""
    if kind == "vllm":
        choice = event["choices"][0]
        got.extend(choice["token_ids"] or [])
        spans = choice.get("weight_versions")
    else:
        got[:] = event.get("output_ids") or got
        meta = event["meta_info"]
        spans = meta.get("weight_versions")
    if spans is None:
        return None
    return tuple(
        Span(label=each["version"], start=each["start"], end=each["end"]) for each in spans
    )


@contextmanager
def under_load(server: EngineServer, answers: list[Answer]) -> Iterator[None]:
    """Keep clients asking for as long as the context lasts; their answers are added to a list."""
    ended = threading.Event()

    def client(prompts: Sequence[Sequence[int]], tokens: int, stream: bool) -> None:
        for prompt in itertools.cycle(prompts):
            if ended.is_set():
                return
            answer = ask(server, prompt, tokens, stream=stream)
            answers.append(answer)
            # A server that refuses or is gone is asked again, but not in a tight loop.
            ended.wait(0.2 if answer.broken else 0.05)

    loads = ((SHORT, 8, False), (SHORT[::-1], 40, True), (LONG, 12, True))
    threads = [threading.Thread(target=client, args=load, daemon=True) for load in loads]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        give_up = time.monotonic() + GIVE_UP_S + 5
        for thread in threads:
            thread.join(max(give_up - time.monotonic(), 0))
