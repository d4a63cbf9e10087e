"""Updates while others call: every one has to succeed, whoever holds the engine meanwhile."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.chaos_update.acts import Verdicts, judge, probe, trainer_of
from tests.chaos_update.cases import ServerKind
from tests.chaos_update.clients import under_load
from tests.chaos_update.fleet import Fleet, Target
from tests.chaos_update.judge import Answer
from tests.chaos_update.models import VARIANTS
from tests.chaos_update.trainer import Trainer
from tests.support.engine_server import TOKEN

__all__ = ["Storm", "StormResult", "run_storm", "storms"]

UPDATE_S = 30.0
_CALLS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "pause, resume, flush": (
        ("/pause", {"timeout_s": 2}),
        ("/pause", {"hold_s": 0.3, "timeout_s": 2}),
        ("/resume", {}),
        ("/flush", {}),
    ),
    "two trainers": (),
}


@dataclass(frozen=True, kw_only=True)
class Storm:
    """Who calls beside a trainer, and where.

    Attributes:
        engine: `vllm` or `sglang`.
        api_servers: API processes.
        calls: which of `_CALLS`.
        callers: clients that make them.
        updates: of each trainer.
    """

    engine: str
    api_servers: int
    calls: str
    callers: int = 4
    updates: int = 20


@dataclass(kw_only=True)
class StormResult(Verdicts):
    """What became of it.

    Attributes:
        storm: which.
        updates: that were made.
        failed: what those were told that failed, and how often.
        longest_s: that an update took.
        calls: of the others, by their status.
        serves: whether the engine serves afterwards.
    """

    storm: Storm
    updates: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)
    serves: bool = False

    @property
    def holds(self) -> bool:
        """Whether all held that must hold."""
        broken = [status for status in self.calls if status not in ("200", "409")]
        return self.serves and not (self.failed or broken or self.wrong or self.lying)


def storms(engine: str) -> list[Storm]:
    """All storms of an engine."""
    pairs = itertools.product((1, 2), _CALLS)
    return [Storm(engine=engine, api_servers=apis, calls=calls) for apis, calls in pairs]


def run_storm(storm: Storm, fleet: Fleet, folder: Path) -> StormResult:
    """Update under load while others call; in the end somebody resumes."""
    kind = ServerKind(
        engine=storm.engine,
        tensor_parallel=1,
        api_servers=storm.api_servers,
        wire="tcp",
        dtype="bfloat16",
    )
    target, result = fleet.target(kind), StormResult(storm=storm)
    answers: list[Answer] = []
    trainers = [
        trainer_of(target, fleet.models, folder, target.server.url)
        for _ in range(2 if storm.calls == "two trainers" else 1)
    ]
    versions = threading.Lock()
    try:
        with under_load(target.server, answers), _called(storm, target, result):
            threads = [
                threading.Thread(target=_update, args=(each, target, versions, result))
                for each in trainers
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        target.server.admin.post("/resume")
        result.serves = probe(target, answers, result)
    finally:
        for each in trainers:
            each.end()
    judge(target, answers, result)
    return result


def _update(
    trainer: Trainer, target: Target, versions: threading.Lock, result: StormResult
) -> None:
    for _ in range(result.storm.updates):
        with versions:
            version, weights = target.next_version()
        trainer.begin(
            weights=weights,
            version=version,
            then=(weights + 1) % VARIANTS,
            timeout_s=UPDATE_S,
            force=True,  # of two trainers the later may have the smaller number
        )
        outcome = trainer.outcome(UPDATE_S + 70)
        with versions:
            result.updates += 1
            result.longest_s = max(result.longest_s, outcome.took_s)
            if outcome.error:
                result.failed[outcome.error.partition("127.0.0.1:")[2][6:150]] += 1


@contextmanager
def _called(storm: Storm, target: Target, result: StormResult) -> Iterator[None]:
    """Clients that call for as long as the context lasts."""
    over, counting = threading.Event(), threading.Lock()

    def caller(seed: int) -> None:
        chance = random.Random(seed)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        url = f"{target.server.url}/admin/v1"
        with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
            while not over.wait(chance.random() / 10):
                path, body = chance.choice(_CALLS[storm.calls])
                try:
                    status = str(http.post(path, json=body).status_code)
                except httpx.HTTPError as error:
                    status = type(error).__name__
                with counting:
                    result.calls[status] += 1

    count = storm.callers if _CALLS[storm.calls] else 0
    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
