"""An adversarial mixture of requests, and what became of each: the judge of the prefill gate.

Small chats among prompts that are long, that ask for the logits of every token, and that come in
bursts. Nothing here knows what the gate predicts: the judge holds answers against what it measures
itself, and against the memory that an idle engine has.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from tests.support.engine_server import EngineServer

__all__ = ["Attack", "Outcome", "mixture", "scored", "sent"]

Kind = Literal["chat", "stream", "long", "long_stream", "logprobs"]
SMALL: tuple[Kind, ...] = ("chat", "stream")
_WEIGHTS: dict[Kind, float] = {
    "chat": 0.35,
    "stream": 0.25,
    "long": 0.15,
    "long_stream": 0.10,
    "logprobs": 0.15,
}


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One request.

    Attributes:
        kind: what it is.
        prompt: token ids.
        tokens: to generate.
        pause_s: before it is sent by its client; 0 within a burst.
    """

    kind: Kind
    prompt: tuple[int, ...]
    tokens: int
    pause_s: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of it.

    Attributes:
        attack: the request.
        status: of HTTP; 0 where the connection broke.
        generated: tokens that came.
        broken: an error after the answer had begun.
        body: of an error.
        retry_after: header of it.
        took_s: until the end.
    """

    attack: Attack
    status: int
    generated: int = 0
    broken: str = ""
    body: str = ""
    retry_after: str | None = None
    took_s: float = 0.0

    @property
    def answered(self) -> bool:
        """Whether all that was asked for has come."""
        return self.status == 200 and not self.broken and self.generated >= self.attack.tokens

    @property
    def refused(self) -> bool:
        """Whether it was refused by a status that says so."""
        return self.status in (413, 503)


def mixture(count: int, *, seed: int, vocab: int, longest: int) -> list[Attack]:
    """A mixture of requests; equal seeds give equal ones."""
    chance = random.Random(seed)
    kinds = list(_WEIGHTS)
    found: list[Attack] = []
    while len(found) < count:
        burst = chance.choice((1, 1, 2, 6))
        for place in range(burst):
            kind = chance.choices(kinds, weights=list(_WEIGHTS.values()))[0]
            low, high = (4, 64) if kind in SMALL else (256, longest)
            length = chance.randint(low, high)
            prompt = tuple(chance.randrange(1, vocab) for _ in range(length))
            pause = 0.0 if place else chance.expovariate(1 / 0.05)
            tokens = chance.randint(1, 6)
            found.append(Attack(kind=kind, prompt=prompt, tokens=tokens, pause_s=pause))
    return found[:count]


def sent(server: EngineServer, attacks: Sequence[Attack], *, clients: int) -> list[Outcome]:
    """Send them, each client the next one when its last has been answered."""
    left = list(reversed(attacks))
    taking = threading.Lock()

    def client() -> list[Outcome]:
        outcomes: list[Outcome] = []
        while True:
            with taking:
                if not left:
                    return outcomes
                attack = left.pop()
            time.sleep(attack.pause_s)
            outcomes.append(_send(server, attack))

    with ThreadPoolExecutor(clients) as pool:
        runs = [pool.submit(client) for _ in range(clients)]
        return [outcome for run in runs for outcome in run.result()]


def scored(server: EngineServer, prompt: Sequence[int], tokens: int = 1) -> httpx.Response:
    """Ask for the log-probabilities of a prompt, by the engine's own route."""
    if server.kind == "vllm":
        body: dict[str, Any] = {"prompt": list(prompt), "max_tokens": tokens, "prompt_logprobs": 1}
        body |= {"return_token_ids": True, "ignore_eos": True, "temperature": 0}
        return server.http.post("/v1/completions", json=body)
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": list(prompt), "sampling_params": sampling}
    body |= {"return_logprob": True, "logprob_start_len": 0}
    return server.http.post("/generate", json=body)


def _send(server: EngineServer, attack: Attack) -> Outcome:
    began = time.monotonic()
    try:
        outcome = _streamed(server, attack) if "stream" in attack.kind else _asked(server, attack)
    except httpx.HTTPStatusError as error:
        outcome = _refusal(attack, error.response)
    except httpx.TransportError as error:
        outcome = Outcome(attack=attack, status=0, broken=repr(error))
    return Outcome(**{**vars(outcome), "took_s": time.monotonic() - began})


def _asked(server: EngineServer, attack: Attack) -> Outcome:
    ask = scored if attack.kind == "logprobs" else type(server).complete
    response = ask(server, attack.prompt, attack.tokens)
    if response.status_code != 200:
        return _refusal(attack, response)
    return Outcome(attack=attack, status=200, generated=len(server.tokens_of(response)))


def _streamed(server: EngineServer, attack: Attack) -> Outcome:
    generated, broken = 0, ""
    for event in server.stream(attack.prompt, attack.tokens):
        generated += len(event.token_ids)
        broken = broken or event.error or ""
        if event.finish_reason in ("error", "abort"):
            broken = broken or event.finish_reason
    return Outcome(attack=attack, status=200, generated=generated, broken=broken)


def _refusal(attack: Attack, response: httpx.Response) -> Outcome:
    response.read()
    return Outcome(
        attack=attack,
        status=response.status_code,
        body=response.text,
        retry_after=response.headers.get("retry-after"),
    )


def summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """How many of each kind met each end."""
    table: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        end = "answered" if outcome.answered else str(outcome.status)
        if outcome.broken:
            end = f"broken after {outcome.status}"
        table.setdefault(outcome.attack.kind, Counter())[end] += 1
    return {kind: dict(ends) for kind, ends in sorted(table.items())}
